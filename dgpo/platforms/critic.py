"""The critic with the attention of `hardware.attention`, as an external module of veRL.

veRL 0.9.1 asks for flash attention for every critic, whatever its configuration says (verl/utils/model.py). Without
that package its own loader ends in a message about another one; with it, actor and critic would differ.
"""

from __future__ import annotations

from typing import Any

import verl.utils.model
from transformers import AutoModelForTokenClassification


def load_critic(local_path: str, torch_dtype: Any, model_config: Any, trust_remote_code: bool) -> Any:
    """A token classifier of one label; its attention is the configuration's."""
    return AutoModelForTokenClassification.from_pretrained(
        local_path, config=model_config, dtype=torch_dtype, trust_remote_code=trust_remote_code
    )


verl.utils.model.load_valuehead_model = load_critic
