# cython: language_level=3, binding=False, autotestdict=False, embedsignature=True, embedsignature.format=clinic
# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Compiled per-job bookkeeping: no I/O, nothing that a handler or Redis could make slow.

``Runner`` starts plain jobs and ends them, ``Run`` drives their coroutines; see fastq/worker/executor.py, which does everything
that is not plain.

``new_id``, ``plain_envelope`` and ``pack_plain`` make what a producer sends of a job that has no options: the bytes that
fastq/job.py and hiredis would make of it, without the objects in between.

``Tokens`` are the units of one limiter that this process was granted and may still use; ``UnitCount`` those that were used.

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
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport PyObject, PyTypeObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE, PyTuple_SET_ITEM
from libc.math cimport INFINITY, isfinite
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
    char *PyUnicode_DATA(object text) noexcept
    object PyUnicode_New(Py_ssize_t size, Py_UCS4 maxchar)
    object PyType_GenericAlloc(PyTypeObject *type, Py_ssize_t items)


cdef extern from *:
    """
    #include <unistd.h>
    #include <sys/random.h>
    """
    int getentropy(void *buffer, size_t size) noexcept nogil


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
cdef class UnitCount:
    """How many units were used in all tokens that count here."""

    cdef public long long value


# What it holds is a UnitCount, which points nowhere.
@cython.final
@cython.no_gc
cdef class Tokens:
    """Units of one limiter, granted to this process in blocks that may each be used up to an instant.

    What was used is counted in ``used``, and in ``total`` if there is one.

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
    cdef public double renew
    """The first ``take`` after this instant makes ``low`` true, too."""
    cdef readonly double granted
    """The ``granted`` of the oldest units in here, as far as is known; of the last ones when there are none."""
    cdef readonly double until
    """The instant up to which what the last ``take`` of units gave may be used."""
    cdef readonly long long used
    """Units that were taken or counted."""
    cdef UnitCount _used_by_all

    def __cinit__(self, UnitCount total=None, /):
        self._used_by_all = total
        self.used = 0
        self._size = 0
        self._total = self.expired = self.mark = 0
        self.granted = self.until = 0.0
        self.renew = INFINITY

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

    cdef void _note(self, long long n) noexcept:
        self.used += n
        if self._used_by_all is not None:
            self._used_by_all.value += n

    def count(self, long long n, /):
        """Count ``n`` units that were used without ``take``; fewer than 0: so many that were taken are not used after all."""
        self._note(n)

    def take(self, long long cost, double now, /):
        """Whether ``cost`` units (>= 0) were there to be used at ``now``; they are taken and counted, or none is."""
        if cost < 0:
            raise ValueError(f"cost {cost} is negative")
        return self._take(cost, now)

    cdef bint _take(self, long long cost, double now) noexcept:
        cdef int used = 0
        if self._size and self._until[0] < now:
            self._drop(now)
        if cost > self._total:
            return False
        self._note(cost)
        self._total -= cost
        self.until = self._until[0]
        if now > self.renew:
            self.mark = self._total + 1
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
        """Whether it is time to ask for more: fewer than ``mark`` units are in here, or one was taken after ``renew``."""
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


# -- running jobs -----------------------------------------------------------------------------------------


cdef extern from "Python.h":
    ctypedef enum PySendResult:
        PYGEN_RETURN
        PYGEN_ERROR
        PYGEN_NEXT
    PySendResult PyIter_Send(PyObject *coroutine, PyObject *value, PyObject **result)
    object PyContextVar_Set(object variable, object value)
    object PyContext_Copy(object context)
    object PyContext_CopyCurrent()
    int PyContext_Enter(object context) except -1
    int PyContext_Exit(object context) except -1
    bint PyCoro_CheckExact(object coroutine)


cdef dict _NONE = {}


cdef inline int _pending() except -1:
    """Raises the exception that a C call has left behind."""
    return -1


@cython.final
cdef class Runner:
    """Starts and ends jobs whose handlers are plain functions, coroutine functions or not, without Python in between.

    ``free`` slots are left; ``finished`` jobs have ended; ``offset`` is Redis's time minus the monotonic one, in seconds.
    ``raised(job, plan, error)``, ``succeeded(job, plan, result)`` and ``reject(job, plan, error)`` are the executor's, for
    whatever is not plain; ``put`` is its threads'; ``ended()`` is called in the next turn of the event loop, once for all jobs that
    ended in this one.
    Each job begins with a copy of ``context``, whoever starts it: often that is the end of another job, in that one's context.
    """

    cdef public long free
    cdef public long finished
    cdef public double offset
    cdef readonly dict running
    cdef public object state, home, desk
    cdef readonly object context
    cdef list _rows
    cdef object _ledger_start, _ledger_finish, _observe, _clock, _task, _loop, _variable
    cdef object _raised, _succeeded, _reject, _put, _ended
    cdef dict _batches
    cdef bint _eager
    cdef bint _told

    def __init__(self, executor, put, metrics, dict batches, loop, variable, clock, task, ended, long slots, list rows, bint eager):
        self.free = slots
        self.finished = 0
        self.offset = 0.0
        self.running = {}
        self._rows = rows
        self._ledger_start, self._ledger_finish, self._observe = metrics.start, metrics.finish, metrics.observe
        self._batches = batches
        self._loop, self._variable, self._clock, self._task = loop, variable, clock, task
        self._raised, self._succeeded, self._reject = executor.raised, executor._succeeded, executor._reject
        self._put = put
        self._ended = ended
        self._eager = eager
        self._told = False
        self.begin_here()

    def begin_here(self):
        """Jobs begin with what the context of this call has: what the application's lifespan has set, say."""
        self.context = PyContext_CopyCurrent()

    def fill(self, backlog, plans, dict limited, long last_life):
        """Start jobs of a backlog (a deque) while slots are free and they are plain; the first that is not stays in it.

        Whether one that is not plain is now the first, and may be started by the executor.
        """
        cdef object job, plan, envelope, now
        while self.free > 0:
            if not backlog:
                return False
            job = backlog[0]
            envelope = job.envelope
            plan = plans.get(envelope.task)
            if plan is None or not plan.plain or envelope.extra is not None or <long>job.deliveries >= last_life:
                return True
            now = self._clock()
            if limited and job.permits is None and envelope.task in limited and not self._passes(job, plan, now):
                return True
            backlog.popleft()
            self.free -= 1
            self._start(job, plan, now)
        return False

    cdef bint _passes(self, job, plan, double now) except *:
        """Whether the one limit of a task has units at hand and nobody waits for it: the job may start at once."""
        cdef object door, gate
        cdef Tokens tokens
        cdef tuple found = plan.doors.get(job.queue)
        if found is None:
            return False
        door = found[0]
        gate = door.gate
        if gate is None or door.waiting or door.parked or gate.waiters:
            return False
        tokens = gate.tokens
        if not tokens._take(found[1], now):
            return False
        if tokens._total < tokens.mark:
            gate.top_up()
        job.permits = ()
        return True

    cpdef start(self, job, plan):
        """Begin to run a plain job."""
        self._start(job, plan, self._clock())

    cdef int _start(self, job, plan, now) except -1:
        cdef object row = self._rows.pop()
        cdef object task
        cdef Run run
        job.started = now
        job.timeout = plan.timeout
        job.max_attempts = plan.max_attempts
        job.row = row
        job.state, job.home, job.desk = self.state, self.home, self.desk
        self._ledger_start(row, job.id)
        self.running[job] = 0.0
        if plan.threaded:
            return self._into_thread(job, plan)
        job.deadline = <double>now + <double>plan.timeout
        run = Run.__new__(Run)
        run._job, run._plan, run._runner = job, plan, self
        if self._eager:
            task = self._task(run, loop=self._loop, name=job.id, eager_start=True, context=PyContext_Copy(self.context))
            if not task.done():
                job.runner = task
        else:
            job.runner = self._task(run, loop=self._loop, name=job.id, context=PyContext_Copy(self.context))
        return 0

    cdef int _into_thread(self, job, plan) except -1:
        cdef object context
        cdef tuple found
        try:
            found = _arguments(job, plan)
        except BaseException as error:
            self._reject(job, plan, error)
            return 0
        context = PyContext_Copy(self.context)
        PyContext_Enter(context)
        try:
            PyContextVar_Set(self._variable, job)
        finally:
            PyContext_Exit(context)
        self._put(job, plan, context, plan.fn, found[0], found[1], self.landed)
        return 0

    cpdef landed(self, job, plan, result, error):
        """A thread has called the handler of a plain job; here is what came of it."""
        if error is None:
            self._returned(job, plan, result)
        else:
            self._raised(job, plan, error)

    cdef int _returned(self, job, plan, result) except -1:
        """The handler of a plain job has returned."""
        if result is None and plan.traceless and not job.abandoned and not job.permits:
            self._success(job, plan)
        elif plan.keeps and not job.abandoned and not job.permits and self._keep(job, plan, result):
            pass
        else:
            self._succeeded(job, plan, result)
        return 0

    cdef void _success(self, job, plan) except *:
        """A job that leaves no trace has succeeded."""
        self._batches[job.queue].succeeded.append(job.id)
        self.done(job, plan.series[job.queue], 0, job.envelope.enqueued_at)

    cdef bint _keep(self, job, plan, result) except *:
        """A job whose result is kept has succeeded; False: the result is not one that can simply be kept."""
        cdef double now = self._clock()
        cdef long long now_ms = <long long>((self.offset + now) * 1000.0)
        cdef long long started = <long long>((self.offset + <double>job.started) * 1000.0)
        cdef object envelope = job.envelope, record
        cdef tuple bucket
        if now_ms >= <long long>plan.bucket_until:
            plan.begin_bucket(now_ms)
        try:
            record = plan.encode((
                "success", envelope.task, envelope.enqueued_at, started, now_ms, envelope.attempt + 1, result, None
            ))
        except Exception:
            return False
        if PyBytes_GET_SIZE(record) > <Py_ssize_t>plan.most_kept:
            return False
        bucket = plan.bucket
        self._batches[job.queue].recorded.append((bucket[0], bucket[1], job.id, record))
        self.done(job, plan.series[job.queue], 0, envelope.enqueued_at)
        return True

    cpdef done(self, job, long series, int status, ready_at):
        """A job has ended: give its row and slot back, count it. ``ready_at``: ms of Redis's clock when it could have started."""
        cdef double started = job.started, now = self._clock(), wait
        cdef object row = job.row
        self._ledger_finish(row)
        self._rows.append(row)
        del self.running[job]
        job.runner = None
        wait = self.offset + started - <double>ready_at / 1000.0
        self._observe(series, status, wait if wait > 0 else 0.0, now - started)
        self.finished += 1
        self.outcome()

    cpdef outcome(self):
        """A slot is free again, and an outcome is there to be settled."""
        self.free += 1
        self.tell()

    cpdef tell(self):
        """Have ``ended`` called in the next turn of the event loop, once."""
        if not self._told:
            self._told = True
            self._loop.call_soon(self._tell)

    def _tell(self):
        self._told = False
        self._ended()


cdef tuple _arguments(job, plan):
    """The arguments of a job, positional and by name, as its handler's types want them."""
    cdef object body, args
    cdef Py_ssize_t count
    cdef unsigned char first
    if job.arguments is not None:
        if isinstance(job.arguments, BaseException):
            raise job.arguments
        return job.arguments
    body = job.envelope.body
    if plan.decoders is not None and type(body) is bytes and PyBytes_GET_SIZE(body) > 0:
        first = <unsigned char>PyBytes_AS_STRING(body)[0]
        count = first & 0x0F
        if first & 0xF0 == 0x90 and <Py_ssize_t>plan.least <= count <= <Py_ssize_t>plan.most:
            try:
                args = plan.decoders[count](body)
            except Exception:  # decode, below, says it in our words
                args = None
            if args is not None:
                return (args, _NONE)
    return plan.task.arguments.decode(body)


@cython.final
@cython.freelist(256)
cdef class Run:
    """The coroutine of a plain job: the handler's own, with what comes before and after it.

    A Task drives it. To the handler all is as in a Task of its own: cancellation, context variables, timeouts.
    """

    cdef object _job, _plan, _inner
    cdef Runner _runner

    def __await__(self):
        return self

    def __iter__(self):
        return self

    @property
    def cr_await(self):
        """What the handler waits for; with the other ``cr_`` attributes this shows a Task's stack as usual."""
        return getattr(self._inner, "cr_await", None)

    @property
    def cr_frame(self):
        return getattr(self._inner, "cr_frame", None)

    @property
    def cr_running(self):
        return getattr(self._inner, "cr_running", False)

    @property
    def cr_code(self):
        return getattr(self._inner, "cr_code", getattr(self._plan.task.fn, "__code__", None))

    @property
    def __qualname__(self):
        return self._plan.task.name

    @property
    def __name__(self):
        return self._plan.task.name

    cdef bint _begin(self) except -1:
        """Decode the arguments and make the handler's coroutine; False: the job has ended already."""
        cdef object job = self._job, plan = self._plan, args, kwargs
        cdef tuple found
        PyContextVar_Set(self._runner._variable, job)
        try:
            found = _arguments(job, plan)
        except BaseException as error:
            self._runner._reject(job, plan, error)
            return False
        args, kwargs = found
        try:
            self._call(plan.fn(*args, **kwargs) if kwargs else plan.fn(*args))
        except BaseException as error:
            self._runner._raised(job, plan, error)
            return False
        return True

    cdef int _call(self, made) except -1:
        """Take what the handler returned when it was called: a coroutine, or whatever else can be awaited."""
        self._inner = made if PyCoro_CheckExact(made) else made.__await__()
        return 0

    cdef object _finish(self, result):
        self._inner = None
        self._runner._returned(self._job, self._plan, result)

    cdef object _fail(self, error):
        self._inner = None
        self._runner._raised(self._job, self._plan, error)

    def __next__(self):
        cdef PyObject *reply = NULL
        cdef PySendResult how
        cdef object value
        if self._inner is None and not self._begin():
            raise StopIteration
        how = PyIter_Send(<PyObject *>self._inner, <PyObject *>None, &reply)
        if how == PYGEN_NEXT:
            value = <object>reply
            Py_DECREF(value)
            return value
        if how == PYGEN_RETURN:
            value = <object>reply
            Py_DECREF(value)
            self._finish(value)
            raise StopIteration
        try:
            _pending()
        except BaseException as error:
            self._fail(error)
        raise StopIteration

    def send(self, value):
        """As a coroutine's."""
        if value is None:
            return self.__next__()
        try:
            return self._inner.send(value)
        except StopIteration as stop:
            self._finish(stop.value)
        except BaseException as error:
            self._fail(error)
        raise StopIteration

    def throw(self, kind, value=None, traceback=None):
        """As a coroutine's: cancellation, mostly."""
        if self._inner is None:  # it has not begun
            PyContextVar_Set(self._runner._variable, self._job)
            self._fail(kind if isinstance(kind, BaseException) else kind() if value is None else value)
            raise StopIteration
        try:
            return self._inner.throw(kind) if value is None and traceback is None else self._inner.throw(kind, value, traceback)
        except StopIteration as stop:
            self._finish(stop.value)
        except BaseException as error:
            self._fail(error)
        raise StopIteration

    def close(self):
        """As a coroutine's."""
        if self._inner is not None:
            self._inner.close()


# -- what a producer sends ---------------------------------------------------------------------

cdef enum:
    _RANDOM = 12  # bytes of an id, twice as many characters
    _INT = 9  # most bytes of a number in msgpack
    _PLAIN_FIELDS = 6  # of a commands.NewJob: id, envelope, delay_ms, unique, chosen, once


cpdef str new_id():
    """24 hexadecimal characters, 96 random bits of the operating system's: unguessable, needs no coordination.

    OSError: it has none to give.
    """
    cdef unsigned char[_RANDOM] random
    cdef const char *digits = b"0123456789abcdef"
    cdef char *text
    cdef int i
    cdef object made
    # Not from a pool of ours: a machine that is restored from a snapshot twice would make the same ids twice.
    if getentropy(random, _RANDOM) != 0:
        raise OSError("the operating system has no random bytes to give")
    made = PyUnicode_New(2 * _RANDOM, 127)
    text = PyUnicode_DATA(made)
    for i in range(_RANDOM):
        text[2 * i] = digits[random[i] >> 4]
        text[2 * i + 1] = digits[random[i] & 15]
    return <str>made


cdef inline char *_big_endian(char *at, unsigned long long value, int size) noexcept:
    cdef int i
    for i in range(size):
        at[size - 1 - i] = <char>(value & 255)
        value >>= 8
    return at + size


cdef inline char *_msgpack_number(char *at, unsigned long long value) noexcept:
    if value < 128:
        at[0] = <char>value
        return at + 1
    if value < 1 << 8:
        at[0] = <char>0xCC
        return _big_endian(at + 1, value, 1)
    if value < 1 << 16:
        at[0] = <char>0xCD
        return _big_endian(at + 1, value, 2)
    if value < <unsigned long long>1 << 32:
        at[0] = <char>0xCE
        return _big_endian(at + 1, value, 4)
    at[0] = <char>0xCF
    return _big_endian(at + 1, value, 8)


cpdef bytes plain_envelope(bytes head, bytes body, unsigned long long enqueued_at):
    """The msgpack of an ``Envelope`` of this body that is enqueued now; ``head``: what precedes the body (job.plain_head).

    OverflowError: a body of 4 GiB or more.
    """
    cdef Py_ssize_t first, size, length
    cdef char[_INT] stamp
    cdef int width = <int>(_msgpack_number(stamp, enqueued_at) - stamp)
    cdef char *at
    cdef bytes made
    if head is None or body is None:
        raise TypeError("head and body are bytes")
    first, size = PyBytes_GET_SIZE(head), PyBytes_GET_SIZE(body)
    if size > 0xFFFFFFFF:
        raise OverflowError(f"a body of {size} bytes")
    length = 1 if size < 1 << 8 else 2 if size < 1 << 16 else 4
    made = PyBytes_FromStringAndSize(NULL, first + 1 + length + size + width + 2)
    at = PyBytes_AS_STRING(made)
    memcpy(at, PyBytes_AS_STRING(head), first)
    at += first
    at[0] = <char>(0xC4 if length == 1 else 0xC5 if length == 2 else 0xC6)
    at = _big_endian(at + 1, size, <int>length)
    memcpy(at, PyBytes_AS_STRING(body), size)
    at += size
    memcpy(at, stamp, width)
    at[width] = 0  # attempt
    at[width + 1] = <char>0xC0  # extra: none
    return made


cdef inline void _put(object made, Py_ssize_t at, object item) noexcept:
    Py_INCREF(item)
    PyTuple_SET_ITEM(made, at, item)


cdef inline object _begin_tuple(type cls, Py_ssize_t first, tuple rest):
    """An instance of a subclass of tuple, with ``rest`` behind room for its first items: its own ``__new__`` takes longer
    than all else about it."""
    cdef Py_ssize_t i
    cdef object made = PyType_GenericAlloc(<PyTypeObject *>cls, first + PyTuple_GET_SIZE(rest))
    for i in range(PyTuple_GET_SIZE(rest)):
        _put(made, first + i, <object>PyTuple_GET_ITEM(rest, i))
    return made


@cython.final
cdef class PlainCalls:
    """Makes the calls of one task that have no options: as ``example`` (task.Call) but for id, body and time.

    For bodies of up to ``max_body`` bytes; -1: there are none. ``head``: what precedes the body (job.plain_head).
    """

    cdef readonly Py_ssize_t max_body
    cdef type _call, _job
    cdef object _queue, _priority
    cdef bytes _head
    cdef tuple _call_rest, _job_rest

    def __init__(self, example, bytes head not None, Py_ssize_t max_body, /):
        cdef object job
        if not isinstance(example, tuple) or len(example) < 3 or not isinstance(example[2], tuple) or len(example[2]) < 2:
            raise TypeError("a call is a tuple of queue, priority, job, a job one of id and envelope; others may follow")
        self._queue, self._priority, job = example[0], example[1], example[2]
        self._call, self._job = type(example), type(job)
        self._call_rest, self._job_rest = tuple(example[3:]), tuple(job[2:])
        self._head, self.max_body = head, max_body

    def make(self, bytes body not None, unsigned long long now_ms, /):
        """A call with a new id; the body is not measured here."""
        cdef object job_id = new_id(), envelope = plain_envelope(self._head, body, now_ms)
        cdef object job = _begin_tuple(self._job, 2, self._job_rest), call = _begin_tuple(self._call, 3, self._call_rest)
        _put(job, 0, job_id)
        _put(job, 1, envelope)
        _put(call, 0, self._queue)
        _put(call, 1, self._priority)
        _put(call, 2, job)
        return call


cdef inline int _digits(unsigned long long value) noexcept:
    cdef int count = 1
    while value >= 10:
        value //= 10
        count += 1
    return count


cdef inline char *_decimal(char *at, unsigned long long value) noexcept:
    cdef int count = _digits(value), i
    for i in range(count):
        at[count - 1 - i] = <char>(48 + value % 10)
        value //= 10
    return at + count


cdef inline Py_ssize_t _word_size(Py_ssize_t size) noexcept:
    return 1 + _digits(size) + 2 + size + 2


cdef inline char *_word(char *at, const char *data, Py_ssize_t size) noexcept:
    at[0] = b"$"
    at = _decimal(at + 1, size)
    at[0], at[1] = b"\r", b"\n"
    memcpy(at + 2, data, size)
    at += 2 + size
    at[0], at[1] = b"\r", b"\n"
    return at + 2


cdef inline char *_head(char *at, Py_ssize_t count, bytes start) noexcept:
    """How many words a command has, and its first ones."""
    at[0] = b"*"
    at = _decimal(at + 1, count)
    at[0], at[1] = b"\r", b"\n"
    memcpy(at + 2, PyBytes_AS_STRING(start), PyBytes_GET_SIZE(start))
    return at + 2 + PyBytes_GET_SIZE(start)


cdef inline bint _is_text(object value) noexcept:
    return type(value) is str and PyUnicode_IS_COMPACT_ASCII(value)


cdef bint _is_plain(object job):
    cdef object delay
    if not isinstance(job, tuple) or PyTuple_GET_SIZE(job) != _PLAIN_FIELDS:
        return False
    delay = <object>PyTuple_GET_ITEM(job, 2)
    return (
        _is_text(<object>PyTuple_GET_ITEM(job, 0))
        and type(<object>PyTuple_GET_ITEM(job, 1)) is bytes
        and type(delay) is int
        and <object>PyTuple_GET_ITEM(job, 3) == ""
        and <object>PyTuple_GET_ITEM(job, 4) is False
        and not delay > 0
    )


def pack_plain(bytes start not None, long words, str producer not None, unsigned long long sequence, jobs, /):
    """The bytes of a call of enqueue_plain.lua with these jobs; None: they are not all plain, or not a list.

    ``start``: the ``words`` words up to the producer, as Redis's protocol has them, without the count before them.
    """
    cdef Py_ssize_t count, size
    cdef char[20] number
    cdef int width
    cdef object job, name, envelope
    cdef char *at
    cdef bytes made
    if type(jobs) is not list or not _is_text(producer):
        return None
    count = words + 2 + 2 * len(<list>jobs)
    width = <int>(_decimal(number, sequence) - number)
    size = 1 + _digits(count) + 2 + PyBytes_GET_SIZE(start) + _word_size(PyUnicode_GET_LENGTH(producer)) + _word_size(width)
    for job in <list>jobs:
        if not _is_plain(job):
            return None
        size += _word_size(PyUnicode_GET_LENGTH(<object>PyTuple_GET_ITEM(job, 0)))
        size += _word_size(PyBytes_GET_SIZE(<object>PyTuple_GET_ITEM(job, 1)))
    made = PyBytes_FromStringAndSize(NULL, size)
    at = _head(PyBytes_AS_STRING(made), count, start)
    at = _word(at, PyUnicode_DATA(producer), PyUnicode_GET_LENGTH(producer))
    at = _word(at, number, width)
    for job in <list>jobs:
        name, envelope = <object>PyTuple_GET_ITEM(job, 0), <object>PyTuple_GET_ITEM(job, 1)
        at = _word(at, PyUnicode_DATA(name), PyUnicode_GET_LENGTH(name))
        at = _word(at, PyBytes_AS_STRING(envelope), PyBytes_GET_SIZE(envelope))
    return made


def pack_listed(bytes start not None, long words, list ids not None, bytes end not None, long more, /):
    """The bytes of a command: ``words`` words, which are ``start``, a count and the ids, and ``more`` words, which are ``end``.

    ``start`` and ``end`` are as Redis's protocol has them, without the count before them. None: an id is not ASCII text.
    """
    cdef Py_ssize_t count = words + 1 + len(ids) + more, size
    cdef char[20] number
    cdef int width = <int>(_decimal(number, len(ids)) - number)
    cdef object name
    cdef char *at
    cdef bytes made
    size = 1 + _digits(count) + 2 + PyBytes_GET_SIZE(start) + _word_size(width) + PyBytes_GET_SIZE(end)
    for name in ids:
        if not _is_text(name):
            return None
        size += _word_size(PyUnicode_GET_LENGTH(name))
    made = PyBytes_FromStringAndSize(NULL, size)
    at = _word(_head(PyBytes_AS_STRING(made), count, start), number, width)
    for name in ids:
        at = _word(at, PyUnicode_DATA(name), PyUnicode_GET_LENGTH(name))
    memcpy(at, PyBytes_AS_STRING(end), PyBytes_GET_SIZE(end))
    return made


# -- what a worker reserves ------------------------------------------------------------------------


def take_in(list ids, list envelopes, deliveries, str queue, dict held, backlog, decode, make, long version, long most):
    """Make jobs of a reply of reserve: into ``held`` by id, and to the end of ``backlog``.

    ``decode`` reads an envelope, ``make(id, queue, envelope, deliveries)`` makes the job. Returns the indices of those that are
    not as they should be: no envelope, not readable, another version, a body of more than ``most`` bytes, an id that is not
    ASCII, or longer than ids are. Nothing was done about these.
    """
    cdef Py_ssize_t i
    cdef list odd = []
    cdef object raw, data, envelope, job, name
    for i in range(len(ids)):
        raw, data = ids[i], envelopes[i]
        try:
            if not data or len(<bytes>raw) > 120:
                odd.append(i)
                continue
            name = (<bytes>raw).decode("ascii")
            envelope = decode(data)
            if <long>envelope.version != version or len(envelope.body) > most:
                odd.append(i)
                continue
        except Exception:
            odd.append(i)
            continue
        job = make(name, queue, envelope, deliveries[i] if deliveries else 0)
        held[name] = job
        backlog.append(job)
    return odd


def forget(dict held, list ids):
    """Take ids out of ``held``; those that are not in it do not matter."""
    for job_id in ids:
        held.pop(job_id, None)
