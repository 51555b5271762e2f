"""Policy terms and gradients from `TokenEngine` against whole logits of the same model. Run by test_token_engine.py.

python tests/engine/token_engine_step.py STUDENT TEACHER PORT: prints, for every way to make micro-batches, the largest
difference of log-probs, entropies, KLs and gradients from those of Hugging Face's model, one episode at a time.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.update(VERL_PLATFORM="cpu", VERL_USE_EXTERNAL_MODULES="dgpo.platforms.cpu", OMP_NUM_THREADS="1")
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[3])

import torch
from tensordict import TensorDict
from torch.nested import as_nested_tensor
from transformers import AutoModelForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.padding import no_padding_2_padding

from dgpo.platforms import CHUNK
from dgpo.platforms.token_engine import KL_KEY
from dgpo.rl.exact_loss import TeacherReader
from dgpo.rl.frozen import FrozenWorker

TEMPERATURE = 0.8
LENGTHS = [(5, 21), (9, 60), (4, 33), (12, 7)]  # of prompts and responses
GATE = [1.0, 0.0, 1.0, 0.0]
WAYS = {  # name -> settings of a batch
    "padded": {"use_remove_padding": False, "use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2},
    "packed": {"use_remove_padding": True, "use_dynamic_bsz": False, "micro_batch_size_per_gpu": 4},
    "packed by tokens": {"use_remove_padding": True, "use_dynamic_bsz": True, "max_token_len_per_gpu": 72},
}
generator = torch.Generator().manual_seed(0)
# Without special tokens: the embedding of padding gets no gradient in veRL.
EPISODES = [torch.randint(10, 50, (prompt + response,), generator=generator) for prompt, response in LENGTHS]
MASKS = [(torch.rand(response, generator=generator) < 0.5).long() for _, response in LENGTHS]


def build(worker: type[TrainingWorker], path: str, *, checkpointing: bool, **settings: object):
    precision = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    built = worker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=HFModelConfig(
                path=path,
                override_config={"attn_implementation": "sdpa"},
                enable_gradient_checkpointing=checkpointing,
                fused_kernel_options={CHUNK: 7},
            ),
            engine_config=FSDPEngineConfig(strategy="fsdp2", mixed_precision=precision, **settings),
            optimizer_config=FSDPOptimizerConfig(lr=1e-6, total_training_steps=1),
            checkpoint_config=CheckpointConfig(),
        )
    )
    built.reset()
    return built.engine


def batch(way: dict[str, object]) -> TensorDict:
    rows = {
        "input_ids": EPISODES,
        "position_ids": [torch.arange(len(ids)) for ids in EPISODES],
        "prompts": [ids[:prompt] for ids, (prompt, _) in zip(EPISODES, LENGTHS, strict=True)],
        "responses": [ids[prompt:] for ids, (prompt, _) in zip(EPISODES, LENGTHS, strict=True)],
        "response_mask": MASKS,
        "loss_mask": MASKS,
    }
    nested = {name: as_nested_tensor(values, layout=torch.jagged) for name, values in rows.items()}
    data = TensorDict({**nested, "teacher_gate": torch.tensor(GATE)}, batch_size=len(EPISODES))
    tu.assign_non_tensor(data, temperature=TEMPERATURE, calculate_entropy=True, pad_token_id=0, **way)
    return data


def weighted(log_probs, entropy, kl, mask, responses):
    """A loss in which every policy token has a weight of its own."""
    weights = mask * (responses + 1.0).sin()
    return (weights * (log_probs + 0.5 * entropy + 2.0 * kl)).sum()


def loss(*, model_output, data, dp_group):
    terms = {name: no_padding_2_padding(values, data) for name, values in model_output.items()}
    padded = data.select("response_mask", "responses").to_padded_tensor()
    seen.append({name: values.detach() for name, values in terms.items()} | {"responses": padded["responses"]})
    return weighted(
        terms["log_probs"], terms["entropy"], terms[KL_KEY], padded["response_mask"], padded["responses"]
    ), {}


def reference(student, teacher):
    """By row: log-probs, entropies and KLs [T] at policy tokens, 0 elsewhere; gradients are left in the student."""
    found = []
    for ids, mask, gate in zip(EPISODES, MASKS, GATE, strict=True):
        logits = student(ids[None]).logits[0, -len(mask) - 1 : -1] / TEMPERATURE
        with torch.no_grad():
            other = teacher(ids[None]).logits[0, -len(mask) - 1 : -1].log_softmax(-1)
        log_probs = logits.log_softmax(-1)
        responses = ids[-len(mask) :]
        terms = {
            "log_probs": log_probs.gather(1, responses[:, None])[:, 0] * mask,
            "entropy": -(log_probs.exp() * log_probs).sum(-1) * mask,
            KL_KEY: (log_probs.exp() * (log_probs - other)).sum(-1) * mask * gate,
        }
        weighted(*terms.values(), mask, responses).backward()
        found.append({name: values.detach() for name, values in terms.items()})
    return found


whole = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
expected = reference(whole, AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32))
gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
frozen = build(FrozenWorker, sys.argv[2], checkpointing=True, forward_only=True, model_dtype="fp32")
differences = {}
for checkpointing in (False, True):
    engine = build(TrainingWorker, sys.argv[1], checkpointing=checkpointing)
    engine.read_teacher = TeacherReader(frozen)
    for name, way in WAYS.items():
        seen: list[dict[str, torch.Tensor]] = []
        with engine.train_mode():
            engine.optimizer_zero_grad()
            engine.forward_backward_batch(batch(way), loss_function=loss)
            off = max(
                float((parameter.grad.full_tensor() - gradients[key]).abs().max())
                for key, parameter in engine.module.named_parameters()
            )
        worst = {"gradient": off, "micro-batches": len(seen)}
        for part in seen:
            for row, responses in enumerate(part["responses"]):
                match = next(
                    i for i, ids in enumerate(EPISODES) if responses[: len(MASKS[i])].equal(ids[-len(MASKS[i]) :])
                )
                for term, values in expected[match].items():
                    gap = float((part[term][row, : len(values)] - values).abs().max())
                    worst[term] = max(gap, worst.get(term, 0.0))
        differences[f"{name}{', checkpointed' if checkpointing else ''}"] = worst
print(json.dumps(differences))
