"""Tables of other libraries as rows: data frames of pandas and polars, Parquet and Arrow files.

None of these libraries is needed by the rest: each is imported where a file asks for it, and a data frame is known by
the methods that it has.
"""

from __future__ import annotations

import io
from typing import Any

from vllm_zo.errors import ConfigError

ARROW_FILE, PARQUET = b"ARROW1", b"PAR1"
"""How a file begins. Any other Arrow file is a stream, which is how the library `datasets` writes them."""


def rows_of_table(source: Any) -> Any:
    """The rows of a table as dictionaries. Anything else is returned as it is.

    It reads a `pandas.DataFrame` without its index, a `polars.DataFrame` and a `pyarrow.Table`.
    """
    if hasattr(source, "to_pylist"):  # pyarrow
        return source.to_pylist()
    if hasattr(source, "to_dicts"):  # polars
        return source.to_dicts()
    if hasattr(source, "to_dict") and hasattr(source, "iloc") and hasattr(source, "columns"):  # pandas
        return source.to_dict("records")
    return source


def read_columns(data: bytes, name: str) -> Any:
    """The `pyarrow.Table` of a Parquet, Feather or Arrow file.

    Args:
        name: the file in messages.

    Raises:
        ConfigError: pyarrow is not installed, or the file is not what its name says.
    """
    try:
        import pyarrow
        import pyarrow.feather
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{name}: the package `pyarrow` is not installed; pip install 'vllm-zo[arrow]'.") from None
    try:
        if data.startswith(PARQUET):
            return pyarrow.parquet.read_table(io.BytesIO(data))
        if data.startswith(ARROW_FILE):
            return pyarrow.feather.read_table(io.BytesIO(data))
        return pyarrow.ipc.open_stream(io.BytesIO(data)).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{name}: cannot be read as Parquet or Arrow: {str(error).splitlines()[0]}.") from None
