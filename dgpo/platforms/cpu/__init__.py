"""veRL 0.9.1 on the CPU, as an external module: `VERL_USE_EXTERNAL_MODULES=dgpo.platforms.cpu VERL_PLATFORM=cpu`.

Imported by `import verl` in every Ray worker. Order matters: the platform must exist before veRL asks for it.
"""

from dgpo.platforms.cpu import distribution_alias, platform  # noqa: I001
from dgpo.platforms.cpu import process_group
from dgpo.platforms.cpu import engines
from dgpo.platforms import critic

__all__ = ["critic", "distribution_alias", "engines", "platform", "process_group"]
