# cython: language_level=3, binding=False, autotestdict=False, embedsignature=True, embedsignature.format=clinic
# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Compiled per-job bookkeeping: no I/O, no await, no clock, no allocation per call.

``Tokens`` are the units of one limiter that this process was granted and may still use.

A ``Ledger`` writes two things into the shared memory of one process's slot (fastq/board.py), and is its only writer:

* cells: doubles that only grow. ``observe`` counts one finished job in the series whose cells start at ``base``;
  ``add`` counts anything else. Each cell is written with one aligned 8-byte store, so a reader in another process sees
  the old or the new number, never a mixture; it may see a job in one cell of its series and not yet in the next.
* rows: the ids of the jobs whose handlers run now, so that a killed worker leaves the names of its suspects behind.

The layout of a series, in cells: one counter per status, then the waiting times (one counter per bucket, one for
everything above the last bound, the sum in seconds), then the run times in the same way. Bucket counters are not
cumulative: one job touches one of them.
"""

from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS,
    PyBUF_FORMAT,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.math cimport isfinite
from libc.string cimport memcpy, strcmp

cimport cython


cdef extern from *:
    """
    /* Plain stores may be moved by the compiler and by an ARM core; these two may not. */
    #define fastq_publish(address, value) __atomic_store_n((address), (unsigned char)(value), __ATOMIC_RELEASE)
    #define fastq_fence() __atomic_thread_fence(__ATOMIC_RELEASE)

    static inline int fastq_is_ascii(const char *text, Py_ssize_t size) {
        unsigned char seen = 0;
        Py_ssize_t i;
        for (i = 0; i < size; i++) seen |= (unsigned char)text[i];
        return seen < 0x80;
    }
    """
    void fastq_publish(unsigned char *address, int value) noexcept nogil
    void fastq_fence() noexcept nogil
    bint fastq_is_ascii(const char *text, Py_ssize_t size) noexcept nogil


cdef extern from "Python.h":
    bint PyUnicode_IS_COMPACT_ASCII(object text) noexcept
    Py_ssize_t PyUnicode_GET_LENGTH(object text) noexcept
    const char *PyUnicode_DATA(object text) noexcept


cdef enum:
    _STATUSES = 7
    _WAITS = 12
    _RUNS = 12
    _ROW = 128
    _WAIT = _STATUSES
    _WAIT_TOTAL = _WAIT + _WAITS + 1
    _RUN = _WAIT_TOTAL + 1
    _RUN_TOTAL = _RUN + _RUNS + 1
    _SERIES = _RUN_TOTAL + 1

# Bounds say what someone acts on: 2 ms an idle worker's pick-up, 0.1 s the promised lateness of a due job,
# 15 s the lease of a lost host, 300 s the default timeout; the rest fills the gaps evenly on a log scale.
cdef double[_WAITS] _wait_bounds = [0.002, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0]
cdef double[_RUNS] _run_bounds = [0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 300.0, 1800.0]

STATUS_COUNT = _STATUSES
WAIT_BUCKETS = tuple([_wait_bounds[i] for i in range(_WAITS)])
RUN_BUCKETS = tuple([_run_bounds[i] for i in range(_RUNS)])
WAIT_CELL = _WAIT
RUN_CELL = _RUN
SERIES_CELLS = _SERIES
ROW_SIZE = _ROW


cdef inline void _place(double *histogram, const double *bounds, int size, double seconds) noexcept nogil:
    cdef int bucket = 0
    if not isfinite(seconds):
        return
    if seconds < 0:
        seconds = 0
    while bucket < size and seconds > bounds[bucket]:
        bucket += 1
    histogram[bucket] += 1
    histogram[size + 1] += seconds


# Its buffers belong to memoryviews, which never point back: no cycle can hold a Ledger. Without this, clearing one
# inside a collected cycle would forget the exporter and leave its mmap impossible to close.
@cython.final
@cython.no_gc
cdef class Ledger:
    """The counters and the running job ids of one process, in its slot's shared memory.

    ``cells`` is a writable buffer of doubles (format ``d``), ``rows`` one of bytes, ``ROW_SIZE`` for each row. Both
    stay exported, so their mmap cannot be closed, as long as the ledger lives. Everything is checked on entry:
    a row, cell, base or status out of range is an IndexError and changes nothing.
    """

    cdef Py_buffer _cell_view
    cdef Py_buffer _row_view
    cdef double *_cell
    cdef unsigned char *_row
    cdef readonly Py_ssize_t cell_count
    cdef readonly Py_ssize_t row_count

    def __cinit__(self, cells, rows, /):
        self.cell_count = self.row_count = 0
        PyObject_GetBuffer(cells, &self._cell_view, PyBUF_WRITABLE | PyBUF_FORMAT | PyBUF_C_CONTIGUOUS)
        if self._cell_view.format is NULL or strcmp(self._cell_view.format, b"d") != 0:
            raise ValueError("cells must be a buffer of doubles (format 'd')")
        PyObject_GetBuffer(rows, &self._row_view, PyBUF_WRITABLE | PyBUF_FORMAT | PyBUF_C_CONTIGUOUS)
        if self._row_view.itemsize != 1:
            raise ValueError("rows must be a buffer of bytes")
        if self._row_view.len % _ROW:
            raise ValueError(f"rows must be a multiple of {ROW_SIZE} bytes, not {self._row_view.len}")
        self._cell = <double *>self._cell_view.buf
        self._row = <unsigned char *>self._row_view.buf
        self.cell_count = self._cell_view.len // <Py_ssize_t>sizeof(double)
        self.row_count = self._row_view.len // _ROW

    def __dealloc__(self):
        PyBuffer_Release(&self._row_view)
        PyBuffer_Release(&self._cell_view)

    def start(self, Py_ssize_t row, job_id, /):
        """Write down that the handler of ``job_id`` (1 to 127 ASCII characters) runs, in row ``row``.

        The length byte is zero while the id is written and set last: whoever reads the row after this process was
        killed finds a whole id or none. TypeError or ValueError for an id that cannot be one.
        """
        cdef const char *text
        cdef Py_ssize_t size
        cdef unsigned char *place
        if row < 0 or row >= self.row_count:
            raise IndexError(f"row {row} of {self.row_count}")
        if type(job_id) is str:
            if not PyUnicode_IS_COMPACT_ASCII(job_id):
                raise ValueError("a job id is ASCII")
            text = PyUnicode_DATA(job_id)
            size = PyUnicode_GET_LENGTH(job_id)
        elif type(job_id) is bytes:
            text = PyBytes_AS_STRING(job_id)
            size = PyBytes_GET_SIZE(job_id)
            if not fastq_is_ascii(text, size):
                raise ValueError("a job id is ASCII")
        else:
            raise TypeError(f"job_id must be str or bytes, not {type(job_id).__name__}")
        if size == 0 or size >= _ROW:
            raise ValueError(f"a job id has 1 to {ROW_SIZE - 1} characters, not {size}")
        place = self._row + row * _ROW
        fastq_publish(place, 0)
        fastq_fence()
        memcpy(place + 1, text, size)
        fastq_publish(place, <int>size)

    def finish(self, Py_ssize_t row, /):
        """Row ``row`` runs nothing any more."""
        if row < 0 or row >= self.row_count:
            raise IndexError(f"row {row} of {self.row_count}")
        fastq_publish(self._row + row * _ROW, 0)

    def add(self, Py_ssize_t cell, double amount, /):
        """Add ``amount`` to one cell."""
        if cell < 0 or cell >= self.cell_count:
            raise IndexError(f"cell {cell} of {self.cell_count}")
        self._cell[cell] += amount

    def observe(self, Py_ssize_t base, Py_ssize_t status, double wait, double run, /):
        """Count one finished job: its status, and its waiting and run time in seconds.

        ``base`` is the first cell of its series. A time that is not finite (NaN: it did not run) is left out of its
        histogram, a negative one (two clocks) counts as 0.
        """
        cdef double *series
        if base < 0 or base > self.cell_count - _SERIES:
            raise IndexError(f"series at cell {base} of {self.cell_count}")
        if status < 0 or status >= _STATUSES:
            raise IndexError(f"status {status} of {STATUS_COUNT}")
        series = self._cell + base
        series[status] += 1
        _place(series + _WAIT, _wait_bounds, _WAITS, wait)
        _place(series + _RUN, _run_bounds, _RUNS, run)


cdef enum:
    _BLOCKS = 8  # grants that overlap: one each half of use_within are two; more are merged, at the earlier end


@cython.final
@cython.no_gc
cdef class Tokens:
    """Units of one limiter, granted to this process in blocks that may each be used up to an instant.

    Times are seconds of one monotonic clock, passed in. What may be used for the shortest time goes first. Nothing is
    lost in here: everything that was put and not taken is in ``drain()``, whether or not it could still be used.
    """

    cdef long long[_BLOCKS] _count
    cdef double[_BLOCKS] _until
    cdef int _size
    cdef long long _total
    cdef readonly long long expired
    """Units that were not used in time and wait for ``drain()``."""
    cdef public long long mark
    """Units below which ``low`` is true."""
    cdef readonly double granted
    """The ``granted`` of the oldest units in here, as far as is known; of the last ones when there are none."""

    def __cinit__(self):
        self._size = 0
        self._total = self.expired = self.mark = 0
        self.granted = 0.0

    cdef void _drop(self, double now) noexcept:
        cdef int gone = 0, i
        while gone < self._size and self._until[gone] < now:
            self.expired += self._count[gone]
            self._total -= self._count[gone]
            gone += 1
        if gone:
            self._shift(gone)

    cdef void _shift(self, int gone) noexcept:
        cdef int i
        self._size -= gone
        for i in range(self._size):
            self._count[i] = self._count[i + gone]
            self._until[i] = self._until[i + gone]

    def take(self, long long cost, double now, /):
        """Whether ``cost`` units (>= 0) were there to be used at ``now``; they are taken, or none is."""
        cdef int used = 0
        if cost < 0:
            raise ValueError(f"cost {cost} is negative")
        if self._size and self._until[0] < now:
            self._drop(now)
        if cost > self._total:
            return False
        self._total -= cost
        while used < self._size and cost >= self._count[used]:
            cost -= self._count[used]
            used += 1
        if cost:
            self._count[used] -= cost
        if used:
            self._shift(used)
        return True

    def put(self, long long n, double until, double granted=0.0, /):
        """Add ``n`` units (>= 0) that may be used up to ``until``. ``granted`` is Redis's time of the grant, in any unit."""
        cdef int i
        if n < 0:
            raise ValueError(f"{n} units are no grant")
        if until != until:
            raise ValueError("until is not a number")
        if n == 0:
            return
        if self._total + self.expired == 0 or granted < self.granted:
            self.granted = granted
        if self._size == _BLOCKS:
            self._size -= 1
            self._count[self._size - 1] += self._count[self._size]
        i = self._size
        while i > 0 and self._until[i - 1] > until:
            self._count[i] = self._count[i - 1]
            self._until[i] = self._until[i - 1]
            i -= 1
        self._count[i] = n
        self._until[i] = until
        self._size += 1
        self._total += n

    @property
    def low(self):
        """Whether fewer than ``mark`` units are in here: time to ask for more."""
        return self._total < self.mark

    def left(self, double now, /):
        """Units that could be taken at ``now``."""
        self._drop(now)
        return self._total

    def drain(self):
        """Everything that was put and not taken, expired or not; nothing is in here afterwards."""
        cdef long long held = self._total + self.expired
        self._size = 0
        self._total = self.expired = 0
        return held
