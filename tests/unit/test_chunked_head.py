import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from dgpo.algorithms.chunked_head import ENTROPY, LOG_PROB, TEACHER_KL, TeacherStates, token_terms

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
AT = torch.tensor([True, False, True, True, False, False, True])


def whole(hidden, head, targets, *, temperature, teacher=None):
    """The same by autograd over whole logits."""
    log_probs = (hidden @ head.T / temperature).log_softmax(-1)
    columns = [log_probs.gather(1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)]
    kl = torch.zeros_like(columns[0])
    if teacher is not None:
        vocab = min(len(head), len(teacher.head))
        student = (hidden[teacher.at] @ head[:vocab].T / temperature).log_softmax(-1)
        other = (teacher.hidden @ teacher.head[:vocab].T).log_softmax(-1)
        kl = kl.index_put((teacher.at,), (student.exp() * (student - other)).sum(-1))
    return torch.stack([*columns, kl], dim=1)


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "hidden": draw(7, 5).requires_grad_(),
        "head": draw(13, 5).requires_grad_(),
        "targets": torch.randint(0, 13, (7,), generator=generator),
        "temperature": 1.3,
        "teacher": TeacherStates(at=AT, hidden=draw(4, 3), head=draw(13, 3)),
    }


def test_autocast_lowers_the_products_alone(case):
    """What RL runs in on a GPU: states and output matrices in bfloat16, log-probs and their sums in float32."""
    teacher = TeacherStates(AT, case["teacher"].hidden.bfloat16(), case["teacher"].head.bfloat16())
    given = {**case, "hidden": case["hidden"].detach().bfloat16(), "head": case["head"].detach().bfloat16()}
    given["teacher"] = teacher
    plain = token_terms(**given, chunk_size=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(token_terms(**given, chunk_size=3), plain)


def test_hand_worked_values():
    # Student (3/4, 1/4), teacher (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2).
    terms = token_terms(
        torch.tensor([[math.log(3.0)]]),
        head=torch.tensor([[1.0], [0.0]]),
        targets=torch.tensor([1]),
        temperature=1.0,
        chunk_size=4,
        teacher=TeacherStates(torch.tensor([True]), torch.zeros(1, 1), torch.ones(2, 1)),
    )[0]
    assert terms[LOG_PROB].item() == pytest.approx(math.log(0.25), abs=1e-6)
    assert terms[ENTROPY].item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), abs=1e-6)
    assert terms[TEACHER_KL].item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 100])
@pytest.mark.parametrize("padded_to", [11, 13, 16])
def test_values_and_gradients_equal_autograd_over_whole_logits(case, chunk_size, padded_to):
    """Whatever the chunk, and with a teacher's vocabulary that is shorter or longer than the student's."""
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(padded_to, 3, generator=generator, dtype=torch.float64)
    teacher = TeacherStates(AT, case.pop("teacher").hidden, head)
    weights = torch.randn(7, 3, generator=generator)
    terms = token_terms(**case, teacher=teacher, chunk_size=chunk_size)
    (terms * weights).sum().backward()
    copies = {name: case[name].detach().clone().requires_grad_() for name in ("hidden", "head")}
    expected = whole(**{**case, **copies}, teacher=teacher)
    (expected * weights).sum().backward()
    torch.testing.assert_close(terms, expected)
    for name, copy in copies.items():
        torch.testing.assert_close(case[name].grad, copy.grad)


def test_a_token_without_weight_gets_no_gradient(case):
    token_terms(**case, chunk_size=2)[AT].sum().backward()
    assert (case["hidden"].grad[~AT] == 0).all()
    assert (case["hidden"].grad[AT] != 0).any(1).all()


def test_the_teacher_counts_only_where_it_was_asked(case):
    assert (token_terms(**case, chunk_size=2)[:, TEACHER_KL] != 0).tolist() == AT.tolist()
    assert (token_terms(**{**case, "teacher": None}, chunk_size=2)[:, TEACHER_KL] == 0).all()


def test_equal_models_have_zero_kl_and_zero_gradient(case):
    same = TeacherStates(AT, case["hidden"][AT].detach(), case["head"].detach())
    kl = token_terms(**{**case, "temperature": 1.0, "teacher": same}, chunk_size=2)[:, TEACHER_KL]
    kl.sum().backward()
    assert kl.abs().max() < 1e-12
    assert case["hidden"].grad.abs().max() < 1e-12
    assert case["head"].grad.abs().max() < 1e-12


def test_no_tokens_give_an_empty_result_and_zero_gradients(case):
    none = {**case, "hidden": case["hidden"][:0], "targets": case["targets"][:0], "teacher": None}
    terms = token_terms(**none, chunk_size=2)
    assert terms.shape == (0, 3)
    terms.sum().backward()
    assert (case["hidden"].grad == 0).all()
    assert (case["head"].grad == 0).all()


def test_tensors_of_different_tokens_are_refused(case):
    with pytest.raises(ValueError, match="7 hidden states but 6 targets"):
        token_terms(**{**case, "targets": case["targets"][:6]}, chunk_size=2)
    short = TeacherStates(AT, case["teacher"].hidden[:3], case["teacher"].head)
    with pytest.raises(ValueError, match="asked for 4 of 7 tokens, and has 3 states"):
        token_terms(**{**case, "teacher": short}, chunk_size=2)


def test_rows_of_logits_are_never_more_than_a_chunk(case, monkeypatch):
    rows = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr("torch.nn.functional.linear", lambda x, w: rows.append(len(x)) or linear(x, w))
    token_terms(**case, chunk_size=3).sum().backward()
    assert max(rows) == 3


@pytest.mark.parametrize(
    "model",
    [
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    ],
    ids=["llama", "qwen2, tied"],
)
def test_a_real_model_gets_the_gradients_of_whole_logits_in_float32(model):
    torch.manual_seed(0)
    model = model()
    ids = torch.randint(0, SIZES["vocab_size"], (1, 40))
    weights = torch.randn(39, 2)

    def gradients(terms):
        model.zero_grad()
        (terms[:, :2] * weights).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    states = model.model(ids).last_hidden_state[0, :-1]
    chunked = token_terms(states, head=model.lm_head.weight, targets=ids[0, 1:], temperature=0.7, chunk_size=16)
    found = gradients(chunked)
    states = model.model(ids).last_hidden_state[0, :-1]
    reference = whole(states, model.lm_head.weight, ids[0, 1:], temperature=0.7)
    torch.testing.assert_close(chunked, reference, atol=1e-5, rtol=1e-5)
    for name, expected in gradients(reference).items():
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-5)
