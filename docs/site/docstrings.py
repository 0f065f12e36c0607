"""How the site reads the package: docstrings as Markdown, and ``hvdtrain.init`` as the function that it is."""

import re
from typing import Any

from griffe import Alias, Extension, Module, Object


class AsMarkdown(Extension):
    """Of ``::``, which announces a literal block, leave what Markdown needs: nothing where it stands alone, else one colon."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Change one object's docstring."""
        if obj.docstring is not None:
            text = re.sub(r"^::$\n?", "", obj.docstring.value, flags=re.M)
            obj.docstring.value = re.sub(r"(\w)::$", r"\1:", text, flags=re.M)

    def on_module_members(self, *, mod: Module, **_: Any) -> None:
        """Let an assigned name be the function that is assigned."""
        if mod.path == "hvdtrain":
            mod.set_member("init", Alias("init", "hvdtrain.backends.create"))
