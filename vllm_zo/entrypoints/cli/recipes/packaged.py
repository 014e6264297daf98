"""The recipes that come with this package, by name."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from vllm_zo.errors import ConfigError
from vllm_zo.validation import check_known


def packaged() -> dict[str, str]:
    """Name -> text of every recipe, in the order of the names."""
    folder = resources.files(__package__)
    files = [file for file in folder.iterdir() if file.name.endswith(".yaml")]
    return {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8") for file in sorted(files, key=str)}


def packaged_file(name: str) -> Path:
    """The file of a recipe.

    Raises:
        ConfigError: there is no such recipe.
    """
    check_known("recipe", name, packaged())
    return Path(str(resources.files(__package__) / f"{name}.yaml"))


def listing() -> str:
    """A line for each recipe: its name and the first line of its file, which says what it does."""
    recipes = packaged()
    width = max(map(len, recipes))
    return "\n".join(f"{name:{width}}  {text.splitlines()[0].removeprefix('# ')}" for name, text in recipes.items())


def copy(name: str, to: Path | None) -> Path:
    """Write a recipe to a file, by default NAME.yaml in the working directory. Returns the file.

    Raises:
        ConfigError: there is no such recipe, or a file is there already.
    """
    text = packaged_file(name).read_text(encoding="utf-8")
    path = to or Path(f"{name}.yaml")
    path = path / f"{name}.yaml" if path.is_dir() else path
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path}: exists already; give another name, or remove it.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}.") from None
    return path
