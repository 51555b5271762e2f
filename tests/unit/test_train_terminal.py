from dgpo.rl.terminal import divert, step_line

RECORD = {"step": 3, "episode/em": 0.4375, "teacher/kl_all": 0.1234, "timing_s/step": 4.06}


def test_a_step_is_a_line_with_the_time_left():
    assert step_line(RECORD, num_steps=20, step_s=5.0) == "step 3/20   EM 0.438   KL 0.123   4.1 s   85 s left"
    assert step_line(RECORD, num_steps=1000, step_s=5.0).endswith("   83 min left")
    assert step_line({**RECORD, "validation/em": 0.5}, num_steps=3, step_s=5.0).endswith(
        "validation EM 0.500   4.1 s   done"
    )


def test_a_step_without_a_teacher_has_no_kl():
    record = {name: value for name, value in RECORD.items() if "kl" not in name}
    assert step_line(record, num_steps=20, step_s=1.0) == "step 3/20   EM 0.438   4.1 s   17 s left"


def test_the_terminal_gets_steps_and_alarms_and_the_log_all(tmp_path, capsys):
    handle = divert(tmp_path / "log.txt")
    handle(
        {"actor_name": "TaskRunner", "pid": 7, "lines": ["{'trainer': 1}", "step 1/2   EM 0.5", "ALARM entropy_low"]}
    )
    handle({"pid": 8, "lines": ["Loading safetensors", "a step 3 in the middle"]})
    assert capsys.readouterr().out == "step 1/2   EM 0.5\nALARM entropy_low\n"
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert len(log) == 5
    assert log[0] == "(TaskRunner 7) {'trainer': 1}"
    assert log[3] == "(ray 8) Loading safetensors"
