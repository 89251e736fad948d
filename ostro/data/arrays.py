"""An `.npy` file written row by row, without knowing its length before the end."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType

import numpy as np


class ArrayFile:
    """Appends rows of one dtype; `columns` are the dims behind the first."""

    def __init__(self, path: Path, dtype: np.dtype, columns: tuple[int, ...] = ()) -> None:
        self._file = path.open("wb")
        self._dtype, self._columns = dtype, columns
        self.num_rows = 0
        self._write_header()

    def append(self, rows: np.ndarray) -> None:
        """Write rows at the end."""
        self._file.write(np.ascontiguousarray(rows, dtype=self._dtype).data)
        self.num_rows += len(rows)

    def close(self) -> None:
        """Write the true length into the header: numpy leaves room in it for this."""
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def __enter__(self) -> ArrayFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            with contextlib.suppress(OSError):  # the disk may be full: the first error tells
                self._file.close()

    def _write_header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self.num_rows, *self._columns),
        }
        np.lib.format.write_array_header_1_0(self._file, header)
