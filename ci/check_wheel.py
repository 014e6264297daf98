"""Load what the installed wheel promises. `ci/wheel.sh` runs this outside the checkout: python check_wheel.py SITE."""

import sys
from importlib import metadata
from pathlib import Path

EXPECTED = {("console_scripts", "vllm-zo"), ("vllm.general_plugins", "zo")}


def main(site: Path) -> None:
    import vllm_zo

    assert site in Path(vllm_zo.__file__).parents, f"imported {vllm_zo.__file__}, not the wheel in {site}"
    (distribution,) = metadata.distributions(name="vllm-zo", path=[str(site)])
    entry_points = distribution.entry_points
    missing = EXPECTED - {(entry.group, entry.name) for entry in entry_points}
    assert not missing, f"entry points missing from the wheel: {sorted(missing)}"
    for entry in entry_points:
        assert callable(entry.load()), f"{entry.value} is not callable"
    print(f"wheel: {distribution.version}, {len(entry_points)} entry points load outside the checkout")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
