"""What the paper prints (arXiv 2508.20324, tables 2, 3 and 6 and the appendix): exact match by set, and which rows make
which table. Rows are named by the preset that reproduces them; `untrained` and `teacher` are the models themselves.
"""

from __future__ import annotations

from collections.abc import Collection

from dgpo.evaluation import gate, rates

SETS = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")

# Rows of every table of ours and of none of the paper's: row -> how it is asked (dgpo/agent/modes.py).
BASELINES = {"closed_book": "closed_book", "rag": "rag", "closed_book_seqkd": "closed_book", "rag_seqkd": "rag"}
ROWS = {
    "main": (
        "untrained", "teacher", "ppo", "sft_ppo", "gkd", "seqkd", "kd", "distillm", "taid", "dgpo", *BASELINES,
    ),
    "ablation": ("dgpo", "no_cold_start", "uniform_kl", "no_teacher", "inverted", "dgpo_grpo", "kd_gkd", *BASELINES),
    "contrasts": ("kd", "dgpo", "uniform_kl", "no_teacher"),
    "pairs": ("untrained", "teacher", "ppo", "kd", "dgpo", *BASELINES),
    "arcap": ("untrained", "teacher", "ppo", "kd", "dgpo"),
    "figures": ("ppo", "grpo", "dgpo", "dgpo_grpo", "no_cold_start", "gkd", "kd_gkd"),
    "teacher_time": ("dgpo",),
    **gate.ROWS,
    **rates.ROWS,
}  # fmt: skip
ARMS = {**gate.ARMS, **rates.ARMS}  # rows that are a preset with overrides of their own
TINY_TABLES = (*gate.TABLES, rates.TABLE)  # of the tiny world, over seeds that their pages name
FIGURES = {"4": ("ppo", "grpo"), "6": ("dgpo", "dgpo_grpo", "no_cold_start", "gkd", "kd_gkd")}  # curves of reward
TEACHER_TIME = 0.095  # by which the 3B teacher makes the whole training longer
TEACHERLESS = ("untrained", "ppo", "grpo", "closed_book", "rag")  # rows that are the same whoever teaches
UNTRAINED = ("untrained", "teacher", "closed_book", "rag")  # models as they are
TABLES = tuple(ROWS)
# Which checkpoint the paper reports, where not the last: the name below a run's `train/models`. PPO: step 200, "before
# training collapse" (sec. B.3); SFT -> PPO the same, which is assumed; w/o cold start: "just before the collapse" (sec.
# 5.6). The rows of figures alone end in a collapse: assumed alike.
RULES = {
    "ppo": "step_200",
    "sft_ppo": "step_200",
    "no_cold_start": "before_collapse",
    "grpo": "before_collapse",
    "dgpo_grpo": "before_collapse",
    "kd_gkd": "before_collapse",
}
# The primary contrasts of tables over several seeds; where "no difference" is a finding, how little it must be.
CONTRASTS = (("dgpo", "kd"), ("dgpo", "uniform_kl"), ("dgpo", "no_teacher"))
EQUIVALENCE_MARGINS = {("dgpo", "uniform_kl"): 0.02}
MAIN_PAIR = "qwen3b_05b"
LABELS = {
    "untrained": "student, untrained",
    "teacher": "teacher",
    "ppo": "PPO",
    "sft_ppo": "SFT -> PPO",
    "gkd": "GKD",
    "seqkd": "SeqKD",
    "kd": "KD",
    "distillm": "DistiLLM",
    "taid": "TAID",
    "dgpo": "DGPO",
    "no_cold_start": "w/o cold start",
    "uniform_kl": "w/o selective KL",
    "no_teacher": "w/o teacher guidance",
    "inverted": "inverted order",
    "dgpo_grpo": "DGPO with GRPO",
    "kd_gkd": "KD -> GKD",
    "grpo": "GRPO",
    "closed_book": "closed book, prompted",
    "rag": "one retrieval, prompted",
    "closed_book_seqkd": "closed book, SeqKD",
    "rag_seqkd": "one retrieval, SeqKD",
    **{row: arm.label for row, arm in ARMS.items()},
}

# By set in the order of SETS, then the average. `dgpo_grpo` and `kd_gkd` are curves in figure 6, without numbers.
EXACT_MATCH = {
    "qwen3b_05b": {
        "untrained": (0.004, 0.006, 0.007, 0.007, 0.015, 0.000, 0.000, 0.006),
        "teacher": (0.365, 0.569, 0.393, 0.340, 0.368, 0.135, 0.298, 0.353),
        "ppo": (0.306, 0.444, 0.379, 0.205, 0.218, 0.041, 0.073, 0.238),
        "sft_ppo": (0.338, 0.415, 0.359, 0.296, 0.275, 0.088, 0.250, 0.289),
        "gkd": (0.266, 0.408, 0.358, 0.216, 0.217, 0.055, 0.161, 0.240),
        "seqkd": (0.331, 0.416, 0.364, 0.283, 0.273, 0.089, 0.169, 0.275),
        "kd": (0.331, 0.431, 0.373, 0.286, 0.284, 0.091, 0.290, 0.298),
        "distillm": (0.333, 0.442, 0.373, 0.288, 0.270, 0.095, 0.209, 0.287),
        "taid": (0.325, 0.427, 0.365, 0.290, 0.270, 0.079, 0.218, 0.282),
        "dgpo": (0.378, 0.481, 0.402, 0.342, 0.303, 0.120, 0.274, 0.329),
        "no_cold_start": (0.370, 0.465, 0.394, 0.330, 0.299, 0.117, 0.266, 0.320),
        "uniform_kl": (0.362, 0.464, 0.394, 0.323, 0.306, 0.114, 0.234, 0.314),
        "no_teacher": (0.353, 0.455, 0.384, 0.316, 0.287, 0.098, 0.250, 0.306),
        "inverted": (0.320, 0.426, 0.371, 0.287, 0.282, 0.084, 0.234, 0.286),
    },
    "qwen7b_05b": {
        "untrained": (0.004, 0.006, 0.007, 0.007, 0.015, 0.000, 0.000, 0.006),
        "teacher": (0.393, 0.610, 0.397, 0.370, 0.414, 0.146, 0.368, 0.385),
        "ppo": (0.306, 0.444, 0.379, 0.205, 0.218, 0.041, 0.073, 0.238),
        "kd": (0.338, 0.428, 0.371, 0.288, 0.223, 0.100, 0.210, 0.280),
        "dgpo": (0.371, 0.474, 0.396, 0.334, 0.257, 0.113, 0.315, 0.323),
    },
    "llama8b_1b": {
        "untrained": (0.052, 0.080, 0.044, 0.027, 0.042, 0.001, 0.024, 0.039),
        "teacher": (0.475, 0.647, 0.448, 0.427, 0.443, 0.179, 0.444, 0.438),
        "ppo": (0.354, 0.499, 0.394, 0.222, 0.181, 0.037, 0.065, 0.250),
        "kd": (0.406, 0.508, 0.405, 0.369, 0.355, 0.119, 0.266, 0.347),
        "dgpo": (0.448, 0.553, 0.437, 0.412, 0.379, 0.155, 0.339, 0.389),
    },
}


def protocol_note(temperatures: Collection[float], *, upstream: bool) -> str:
    """How the paper's numbers were measured, and ours: to stand wherever the two do.

    Args:
        temperatures: of our episodes.
        upstream: whether ours were measured by `test.compat=upstream`.
    """
    if upstream:
        return "Both by the protocol of the authors' release."
    sampled = "of temperature " + ", ".join(f"{t:g}" for t in sorted(temperatures))
    return (
        "The paper's numbers are of single samples at temperature 1 (Bamboogle: 124 of 125 questions); ours are "
        f"{sampled if any(temperatures) else 'greedy'}. `test.compat=upstream` measures as the paper does."
    )


def paper_value(pair: str, row: str, column: str) -> float | None:
    """The paper's exact match of a row in a set, or in `average`; None where it prints none."""
    values = EXACT_MATCH.get(pair, {}).get(row)
    columns = (*SETS, "average")
    return values[columns.index(column)] if values and column in columns else None


# ARCap, exact match with the gold passages given: (answered at once, may think first). A second table, of hit ratios
# and numbers of searches, is discussed in sections 5.4 and 5.5; it is not among what is transcribed here.
ARCAP = {
    "qwen3b_05b": {
        "nq": {
            "untrained": (0.386, 0.034),
            "teacher": (0.589, 0.560),
            "ppo": (0.547, 0.581),
            "kd": (0.540, 0.544),
            "dgpo": (0.565, 0.593),
        },
        "musique": {
            "untrained": (0.166, 0.013),
            "teacher": (0.413, 0.357),
            "ppo": (0.258, 0.242),
            "kd": (0.321, 0.256),
            "dgpo": (0.312, 0.287),
        },
    },
}
ARCAP_COLUMNS = ("source_referencing", "using_evidence")


def paper_arcap(pair: str, row: str, dimension: str, set_name: str) -> float | None:
    """The paper's ARCap value of a row; None where it prints none."""
    values = ARCAP.get(pair, {}).get(set_name, {}).get(row)
    return values[ARCAP_COLUMNS.index(dimension)] if values and dimension in ARCAP_COLUMNS else None
