"""What the distillation stage refuses before any model is loaded."""

import pytest

from dgpo.checks import check_distill
from dgpo.errors import ConfigError
from tests.distill_stage import write_stage


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("distill.loss=kl", "expected one of kd, seqkd, distillm"),
        ("distill.sharding=half", "expected one of none, full"),
        ("distill.skew=1.5", "distill.skew=1.5: expected a number from 0 to 1"),
        ("distill.held_out_share=-1", "distill.held_out_share=-1.0"),
        ("distill.taid.t_start=2", "distill.taid.t_start=2.0"),
        ("distill.taid.t_end=0.3", "is above distill.taid.t_end=0.3"),
        ("distill.patience=0", "distill.patience=0: expected at least 1"),
        ("hardware.gpus_per_node=9", "distill.batch_size=8 on 9 GPUs"),
        ("distill.sharding=full", "more than one GPU"),
        ("hardware.dtype=float16", "use bfloat16 or float32"),
        ("distill.loss=distillm", "adapts to the held-out loss"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        check_distill(write_stage(tmp_path, [change]))


def test_distillm_needs_the_retriever_and_a_buffer_for_a_batch(tmp_path):
    loss = ["distill.loss=distillm", "distill.held_out_share=0.1"]
    with pytest.raises(ConfigError, match="no retrieval server answers"):
        check_distill(write_stage(tmp_path, [*loss, "retriever.url=http://127.0.0.1:9"]))
    with pytest.raises(ConfigError, match="buffer_size=4 holds no batch of 8"):
        check_distill(write_stage(tmp_path, [*loss, "distill.student_episodes.buffer_size=4"]))
