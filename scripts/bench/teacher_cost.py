"""What the teacher adds to a step of RL when it scores the failed episodes only, against scoring every episode.

    python scripts/bench/teacher_cost.py train.teacher_term.form=reward train.batch_size=256 train.mini_batch_size=64
    python scripts/bench/teacher_cost.py train.teacher_term.form=exact train.batch_size=256 train.mini_batch_size=64

Every step of one run does the teacher's part several times on the same episodes, in an order that rotates: for the
failed episodes, for those and the ones that are only monitored (what a run does), for all of them (the authors'
release), and, in the exact form, where the part is the actor's update, with the gate closed. The learning rate is next
to nothing, so that repeated updates change no weights. Inputs are as in step.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from step import inputs

from dgpo.config.load import load_config
from dgpo.files import read_jsonl
from dgpo.rl import task_runner, train

SETTINGS = ["train.actor_learning_rate=1e-12", "train.critic_learning_rate=1e-12", "train.save_every=0"]
OUT = "teacher_cost.jsonl"
WAYS = ("closed", "failed", "as run", "all")
ALLOWANCE = 0.05  # share of what scoring every episode adds, on top of the share that failed


class MeasuringTaskRunner(task_runner.TaskRunner):
    def trainer_class(self) -> type:
        return measuring_trainer()


def measuring_trainer() -> type:
    import time

    import ray
    import torch
    import transfer_queue as tq
    from tensordict import TensorDict

    from dgpo.rl.loop import DGPOTrainer
    from dgpo.rl.metrics import choose_monitored

    class MeasuringTrainer(DGPOTrainer):
        def _chosen(self, batch: Any, way: str) -> list[int]:
            """Rows of the batch; on several ranks filled up to what divides."""
            correct = torch.tensor([score["em"] for score in self.played.scores])
            gated = {"closed": correct < 0, "failed": correct < 0.5, "as run": correct < 0.5, "all": correct >= 0}[way]
            monitored = choose_monitored(
                correct,
                already=gated,
                num_monitored=self.settings.teacher.num_monitored if way == "as run" else 0,
                multiple=self.num_ranks,
            )
            return torch.nonzero(gated | monitored)[:, 0].tolist()

        def _workers_cpu_s(self) -> float:
            """CPU time that the model workers have used: says little of GPUs, and all of a CPU that others use too."""
            calls = [
                worker.__ray_call__.remote(lambda _: time.process_time()) for worker in self.actor_rollout_wg.workers
            ]
            return sum(ray.get(calls))

        def _time_ways(self, ways: Sequence[str], act: Any) -> None:
            shift = self.global_steps % len(ways)
            record: dict[str, float] = {"step": self.global_steps}
            for way in [*ways[shift:], *ways[:shift]]:
                started, cpu_started = time.perf_counter(), self._workers_cpu_s()
                act(way)
                record[way] = time.perf_counter() - started
                record[f"{way}, CPU"] = self._workers_cpu_s() - cpu_started
            record["failed share"] = sum(score["em"] < 0.5 for score in self.played.scores) / len(self.played.scores)
            with self.metrics_path.with_name(OUT).open("a") as file:
                file.write(json.dumps(record) + "\n")

        def _read_played(self, batch: Any) -> Any:
            self.played = super()._read_played(batch)
            return self.played

        def _teacher_log_probs(self, batch: Any, played: Any, metrics: dict) -> Any:
            if not self.teacher.form.in_loss:

                def score(way: str) -> None:
                    chosen = batch.select_keys([batch.keys[row] for row in self._chosen(batch, way)])
                    self.teacher.score(chosen, self.actor_rollout_wg)

                self._time_ways(("failed", "as run", "all"), score)
            return super()._teacher_log_probs(batch, played, metrics)

        def _update_actor(self, batch: Any, metrics: dict) -> Any:
            if self.teacher.form.in_loss:
                update = super()._update_actor

                def gate_and_update(way: str) -> None:
                    gate = torch.zeros(len(batch))
                    gate[self._chosen(batch, way)] = 1.0
                    fields = TensorDict({"teacher_gate": gate}, batch_size=len(batch))
                    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
                    update(batch, {})

                self._time_ways(("closed", "failed", "all"), gate_and_update)
            return super()._update_actor(batch, metrics)

    return MeasuringTrainer


def summarize(records: Sequence[dict[str, float]], steps: dict[float, float]) -> None:
    """Prints medians over the steps, of which the first is left out."""
    kept = [record for record in records if record["step"] > 1]
    median = {name: statistics.median(record[name] for record in kept) for name in kept[0]}
    bound = median["failed share"] + ALLOWANCE
    for unit in ("", ", CPU"):
        closed = median.get(f"closed{unit}", 0.0)
        for way in WAYS:
            if way in median:
                value = median[f"{way}{unit}"]
                print(f"{way + unit:14} {value:.3f} s, adds {value - closed:.3f} s")
        shares = [
            (r[f"failed{unit}"] - r.get(f"closed{unit}", 0.0)) / (r[f"all{unit}"] - r.get(f"closed{unit}", 0.0))
            for r in kept
        ]
        share = statistics.median(shares)
        print(
            f"failed / all{unit}, added: {share:.3f}, {'within' if share <= bound else 'ABOVE'} the bound {bound:.3f}"
        )
    closed = median.get("closed", 0.0)
    # A step makes its own pass of the teacher besides those that are measured.
    rest = statistics.median(
        steps[r["step"]] - sum(r.get(way, 0.0) for way in WAYS) - (r.get("as run", r["failed"]) - r.get("closed", 0.0))
        for r in kept
    )
    print(f"a step without the teacher {rest:.3f} s: failed adds {(median['failed'] - closed) / rest:.1%}", end=", ")
    print(f"all {(median['all'] - closed) / rest:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="the first of which warms up")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="of the world and of the runs")
    options, overrides = parser.parse_known_args()
    folder = options.folder.resolve()

    task_runner.TaskRunner = MeasuringTaskRunner  # type: ignore[misc]
    os.environ.setdefault("RAY_worker_niceness", "0")
    with inputs(folder, overrides) as given:
        run_dir = folder / "teacher_cost"
        own = [f"train.num_steps={options.steps}", f"run_dir={run_dir}", "data.validation_file=null"]
        shutil.rmtree(run_dir, ignore_errors=True)
        train.train(load_config([*given, *SETTINGS, *overrides, *own]))
    records = [json.loads(line) for line in (run_dir / "train" / OUT).read_text().splitlines()]
    metrics = read_jsonl(run_dir / "train" / "metrics.jsonl")
    summarize(records, {int(record["step"]): record["timing_s/step"] for record in metrics})


if __name__ == "__main__":
    main()
