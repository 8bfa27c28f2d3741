"""The import hook: changes a few of MAX's modules as they are imported, and costs other programs next to nothing.

Python imports this file whenever it starts where the package is installed (`step3p5.pth`): it imports nothing itself.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

CHANGED_MODULES = frozenset(
    {
        "max.pipelines.lib.pipeline_args",
        "max.pipelines.lib._hf_config",
        "max.pipelines.lib.auto_model",
        "max.pipelines.lib.config.config",
    }
)
"""Each has a function in `step3p5.hook.patches.PATCHES`."""


class PatchingFinder:
    """Finds the modules of `CHANGED_MODULES` where Python would, and has each changed once it has been executed."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name not in CHANGED_MODULES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_patch(module: "ModuleType") -> None:
            execute(module)
            from step3p5.hook.patches import patch

            patch(module)

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]  # of this module's own loader
        return spec


def install() -> None:
    """Puts the finder before Python's own; once."""
    if not any(isinstance(finder, PatchingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, PatchingFinder())
