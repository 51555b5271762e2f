"""The arithmetic of placement, memory and time, on numbers worked by hand."""

from __future__ import annotations

import pytest

from dgpo.config.load import load_config
from dgpo.hardware import memory
from dgpo.hardware.budget import Budget, Models, distill_budget, engine_share, is_on_this_node, rl_budget
from dgpo.hardware.fit import changed_config, explain, nearest_fit
from dgpo.hardware.known_gpus import GIB, KNOWN_GPUS
from dgpo.hardware.memory import Precision
from dgpo.hardware.placement import place, ranges
from dgpo.hardware.shapes import ModelShape, find_shape, known_shape, shape_from_config
from dgpo.hardware.throughput import decode_step_s, gather_s, generation_s, operations_per_token, rl_throughput
from tests.unit.stubs import make_model

# Two layers of width 4, two heads of 2 over one of keys and values, an MLP of 8, ten words.
TINY = ModelShape(4, 2, 2, 1, 2, 8, 10, tied=False)
HALF = Precision(value=2, stream=2)
BIG = ModelShape(4096, 32, 32, 8, 128, 14336, 128256, tied=False)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as published on the models' pages
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("omron-sinicx/SearchR1-ppo-qwen2.5-3b-instruct", 3_085_938_688),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-14B-Instruct", 14_770_033_664),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("meta-llama/Llama-3.2-3B", 3_212_749_824),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
    ],
)
def test_the_parameters_of_known_models_are_the_published_ones(name, parameters):
    assert known_shape(name).parameters == parameters


def test_a_name_that_only_resembles_a_known_model_is_not_known():
    assert known_shape("Qwen/Qwen2.5-0.5Bx") is None
    assert known_shape("me/model") is None


def test_the_parameters_of_a_model_by_hand():
    # attention 4x4 + 4x2 + 4x2 + 4x4 = 48, MLP 3x4x8 = 96, norms 8
    assert TINY.layer == 152
    assert TINY.body == 40 + 2 * 152 + 4
    assert TINY.parameters == TINY.body + 40
    assert TINY.critic == TINY.body + 4 + 1
    assert TINY.multiplied == 2 * 152 + 4 + 40


def test_biases_and_query_norms_are_counted():
    sizes = {"hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"intermediate_size": 8, "vocab_size": 10, "head_dim": 2}
    assert shape_from_config({"model_type": "llama", **sizes}) == TINY
    assert shape_from_config({"model_type": "qwen2", **sizes}).layer == 152 + 4 + 2 + 2
    assert shape_from_config({"model_type": "qwen3", **sizes}).layer == 152 + 2 + 2
    gemma = shape_from_config({"model_type": "gemma3_text", **sizes})
    assert gemma.layer == 152 + 2 + 2 + 2 * 4
    assert gemma.tied
    assert shape_from_config({"model_type": "mamba", **sizes}) is None
    assert shape_from_config({"max_position_embeddings": 8192}) is None


def test_what_an_earlier_stage_will_write_has_the_shape_of_what_it_starts_from():
    config = load_config(["pair=qwen7b_05b"])
    student, teacher = known_shape("qwen2.5-0.5b"), known_shape("qwen2.5-7b")
    assert find_shape(config, "runs/default/distill/model") == student
    assert find_shape(config, "runs/another/train/model") == student
    assert find_shape(config, config.teacher.path) == teacher


def test_a_folder_that_does_not_say_its_shape_is_unknown(tmp_path):
    assert find_shape(load_config(), make_model(tmp_path / "model")) is None


def test_keys_and_values_by_hand():
    assert memory.kv_bytes_per_token(TINY, value=2) == 2 * 2 * 1 * 2 * 2
    assert memory.kv_bytes_per_token(BIG, value=2) == 131_072  # 128 KiB
    assert memory.kv_bytes_per_token(BIG, value=2, tensor_parallel=4) == 131_072 / 4
    assert memory.kv_bytes_per_token(BIG, value=2, tensor_parallel=16) == 131_072 / 8  # one head at least


def test_activations_by_hand():
    # norms 2x(16 + 8 + 4), inputs of projections 2x(8 + 4), attention 2x(4 + 4) + 4x2, MLP 2x4x8
    assert memory.layer_activations(TINY, HALF) == 56 + 24 + 24 + 64
    final = 4 * 4 + 4 * 4 + 4 + 8
    assert memory.saved_activations(TINY, 3, HALF, checkpointing=True) == 3 * (2 * 8 + final)
    assert memory.saved_activations(TINY, 3, HALF, checkpointing=False) == 3 * (2 * 168 + final + 8)


def test_checkpointing_pays_for_one_layer_when_it_runs_backward():
    plain = memory.backward_workspace(TINY, 3, HALF, checkpointing=False)
    assert plain == 2 * (3 * 8 + 32)
    assert memory.backward_workspace(TINY, 3, HALF, checkpointing=True) == plain + 3 * 168


def student_on(config, **changes):
    for key, value in changes.items():
        setattr(config.hardware, key, value)
    return rl_budget(config, Models(known_shape("qwen2.5-0.5b"), critic=True))


def test_states_of_an_actor_and_a_critic_by_hand():
    config = load_config(["pair=qwen3b_05b"])
    count, critic = 494_032_768, 494_032_768 + 896 + 1
    one = student_on(config, gpus_per_node=1).phases
    assert one["generate"]["weights"] == 4 * (count + critic)
    assert one["generate"]["optimiser"] == 8 * (count + critic)
    assert one["update actor"]["gradients"] == 4 * count
    eight = student_on(config, gpus_per_node=8).phases
    assert eight["update critic"]["gradients"] == 4 * critic / 8
    assert eight["generate"]["optimiser"] == one["generate"]["optimiser"] / 8


def test_shards_within_a_node_do_not_shrink_with_more_nodes():
    config = load_config(["hardware=h200x8xN", "hardware.num_nodes=2", "pair=qwen3b_05b"])
    two = student_on(config).phases["generate"]["weights"]
    assert student_on(config, num_nodes=4).phases["generate"]["weights"] == two
    assert student_on(config, num_nodes=4, fsdp_size=None).phases["generate"]["weights"] == two / 4


def test_offloaded_states_wait_in_host_memory():
    config = load_config(["hardware=gpu24gb", "pair=qwen3b_05b"])
    count, critic = 494_032_768, 494_032_768 + 896 + 1
    idle = student_on(config, offload="idle")
    assert idle.phases["generate"]["weights"] == idle.phases["generate"]["optimiser"] == 0
    assert idle.phases["update actor"]["weights"] == 4 * count
    assert idle.host["actor"] + idle.host["critic"] == 12 * (count + critic)
    full = student_on(config, offload="full")
    assert full.phases["update actor"]["weights"] == full.phases["update actor"]["gradients"] == 0
    assert full.host["actor"] == 16 * count
    assert student_on(config, offload="none").host.get("actor") is None


def test_the_logits_are_those_of_a_chunk_by_hand():
    config = load_config(["pair=qwen3b_05b", "train.teacher_term.gate=none"])
    assert student_on(config).phases["score"]["logits"] == 2 * 256 * 151936 * 4
    config.train.chunk_tokens = 100_000  # more than a micro-batch has
    assert student_on(config).phases["update actor"]["logits"] == 2 * 16384 * 151936 * 4
    assert student_on(config, max_tokens_per_gpu=None).phases["score"]["logits"] == 2 * 8 * 6144 * 151936 * 4


def test_the_exact_term_holds_the_teacher_inside_the_update():
    config = load_config(["pair=qwen3b_05b", "train.teacher_term.form=exact"])
    models = Models(known_shape("qwen2.5-0.5b"), known_shape("qwen2.5-3b"), critic=True)
    phases = rl_budget(config, models).phases
    assert "teacher" not in phases
    config.train.chunk_tokens = 16_384  # then the loss is the fullest part of the update
    update = rl_budget(config, models).phases["update actor"]
    assert update["teacher"] > 2 * 2 * 151936 * 2048  # its embedding, gathered, and as a head
    assert update["logits"] == 5 * 16_384 * 151936 * 4
    config.train.teacher_term.form = "reward"
    assert "teacher" in rl_budget(config, models).phases


def test_the_engine_fills_its_share_with_keys_and_values():
    config = load_config(["pair=qwen3b_05b"])
    shape = known_shape("qwen2.5-0.5b")
    share = engine_share(config, shape)
    assert sum(share.awake.values()) == pytest.approx(0.5 * KNOWN_GPUS["h200"].memory)
    assert share.kv_tokens == share.awake["engine KV cache"] / (2 * 24 * 2 * 64 * 2)
    assert sum(engine_share(config, shape, alone=True).awake.values()) == pytest.approx(0.9 * KNOWN_GPUS["h200"].memory)


def test_an_engine_that_does_not_sleep_is_there_in_every_phase():
    config = load_config(["pair=qwen3b_05b", "hardware.engine.sleep=false"])
    phases = student_on(config).phases
    assert all(parts["engine KV cache"] == phases["generate"]["engine KV cache"] for parts in phases.values())


def test_distillation_by_ddp_and_by_shards():
    config = load_config(["pair=qwen3b_05b"])
    models = Models(known_shape("qwen2.5-0.5b"), known_shape("qwen2.5-3b"))
    whole = distill_budget(config, models).phases["train"]
    config.distill.sharding = "full"
    sharded = distill_budget(config, models).phases["train"]
    assert whole["optimiser"] == 8 * sharded["optimiser"] == 8 * 494_032_768
    assert whole["teacher"] == sharded["teacher"] > 2 * 3_085_938_688


def test_a_budget_names_what_does_not_fit():
    phases = {"generate": {"engine KV cache": 3 * GIB}, "update actor": {"weights": 2 * GIB, "logits": 4 * GIB}}
    assert Budget(phases, capacity=8 * GIB).problem is None
    assert Budget(phases, capacity=5 * GIB).problem == "update actor needs 6.0 GiB per GPU, of 5.0"
    assert Budget(phases, capacity=None).problem is None
    few = Budget(phases, capacity=8 * GIB, kv_tokens=100, kv_tokens_needed=6144)
    assert few.problem == "the engine's KV cache has room for 100 tokens, fewer than one episode's 6144"
    host = Budget(phases, capacity=8 * GIB, host={"teacher": 9 * GIB}, host_capacity=8 * GIB)
    assert host.problem == "9 GiB of host memory per node, of 8"


def test_the_mildest_single_setting_is_preferred():
    config = load_config(["hardware=h200x8", "pair=llama8b_1b", "hardware.max_tokens_per_gpu=1048576"])
    models = Models(known_shape("llama-3.2-1b"), critic=True)
    assert rl_budget(config, models).problem
    assert nearest_fit(config, "train", models) == ["hardware.max_tokens_per_gpu=524288"]
    smaller = nearest_fit(config, "train", models, is_valid=lambda c: c.hardware.max_tokens_per_gpu < 100_000)
    assert smaller == ["hardware.max_tokens_per_gpu=65536"]


def test_more_gpus_are_suggested_only_where_no_setting_helps():
    config = load_config(["hardware=gpu24gb", "experiment=teacher_ppo", "pair=qwen3b_05b"])
    models = Models(known_shape("qwen2.5-3b"), critic=True, initial_policy=True)
    fit = nearest_fit(config, "train", models)
    assert fit is not None
    assert any(setting.startswith(("hardware.gpus_per_node=", "hardware.num_nodes=")) for setting in fit)


def test_what_fits_nowhere_is_said():
    budget = Budget({"train": {"teacher": 99 * GIB}}, capacity=10 * GIB)
    assert "no setting tried makes it fit" in explain(budget, None)


def test_a_changed_configuration_leaves_the_original_alone():
    config = load_config()
    changed = changed_config(config, [("hardware.engine.max_num_seqs", 3)])
    assert (changed.hardware.engine.max_num_seqs, config.hardware.engine.max_num_seqs) == (3, 256)


def test_placement_of_replicas_and_shards():
    config = load_config(["hardware=h200x8xN", "hardware.num_nodes=2", "hardware.engine.tensor_parallel_size=4"])
    placement = place(config, "train")
    assert placement.replicas == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert (placement.shards, placement.copies) == (8, 2)
    assert (place(config, "distill").shards, place(config, "distill").copies) == (1, 16)
    assert place(config, "collect").shards == 0
    assert ranges([4, 5, 6, 7]) == "4-7"


@pytest.mark.parametrize(("url", "here"), [("http://127.0.0.1:8000", True), ("http://node0:8000,http://x:1", False)])
def test_where_the_retriever_is(url, here):
    assert is_on_this_node(url) is here


def test_a_decoding_step_reads_weights_and_caches_once():
    gpu = KNOWN_GPUS["h200"]
    read = 2 * BIG.multiplied + 100 * 1000 * 131_072
    expected = read / (4.8e12 * 0.7) + 0.006
    assert decode_step_s(BIG, gpu, episodes=100, context=1000, value=2, size=1) == pytest.approx(expected)


def test_a_pass_over_tokens_by_hand():
    assert operations_per_token(TINY, 10) == 2 * 348 + 2 * 2 * 4 * 10


def test_gathering_within_a_node_and_reducing_between_nodes():
    config, gpu = load_config(["hardware=h200x8xN", "hardware.num_nodes=2"]), KNOWN_GPUS["h200"]
    count = BIG.parameters
    assert gather_s(config, gpu, BIG, training=False) == pytest.approx(2 * count * 7 / 8 / (450e9 * 0.7))
    within = (4 + 4) * count * 7 / 8 / (450e9 * 0.7)
    between = 2 * 4 * count / 8 / (50e9 * 0.7)
    assert gather_s(config, gpu, BIG, training=True) == pytest.approx(within + between)


def test_twice_the_gpus_halve_the_arithmetic():
    config = load_config(["pair=qwen3b_05b"])
    models = Models(known_shape("qwen2.5-0.5b"), known_shape("qwen2.5-3b"), critic=True)
    one = rl_throughput(config, models)
    config.hardware.num_nodes, config.hardware.fsdp_size = 2, 8
    two = rl_throughput(config, models)
    assert two.seconds["teacher"] == pytest.approx(one.seconds["teacher"] / 2)
    assert one.total_hours == pytest.approx(one.step_s * 1000 / 3600)
    assert one.episodes_per_hour == pytest.approx(512 / one.step_s * 3600)


def test_generation_takes_as_long_as_its_longest_episode():
    config, gpu = load_config(), KNOWN_GPUS["h200"]
    shape = known_shape("qwen2.5-0.5b")
    assert generation_s(config, gpu, shape, episodes=8, alone=False) > 4 * 250 * 0.006


def test_no_estimate_without_a_gpu():
    assert rl_throughput(load_config(["hardware=cpu"]), Models(TINY)) is None
