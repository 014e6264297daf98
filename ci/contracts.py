"""A contract for import-linter that it does not bring: no circle of files. Named in pyproject.toml."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, output


class NoCircleOfFiles(Contract):
    """No file imports itself through others. `acyclic_siblings` asks more (no circle of folders) and less (it does not
    see a package's `__init__`)."""

    type_name = "no_circle_of_files"

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        imported_by_file = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
        try:
            TopologicalSorter(imported_by_file).prepare()
        except CycleError as error:
            return ContractCheck(kept=False, metadata={"circle": error.args[1][::-1]})
        return ContractCheck(kept=True)

    def render_broken_contract(self, check: ContractCheck) -> None:
        output.print_error(" -> ".join(check.metadata["circle"]))
        output.new_line()
