"""How a process finds the application: ``package.module:app``, or the entry points of installed libraries.

The settings of a fleet come, later ones winning, from: defaults, the file, the environment, the application's own code
(``FastQ(url, concurrency=…)``), the command's options. So the application must be asked before the first process is
started; that is done in a process of its own, and the supervisor never holds the application's code.
"""

from __future__ import annotations

import importlib
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from fastq import config
from fastq.app import FastQ
from fastq.config import Settings
from fastq.errors import ConfigError, ExitCode, FastQError, did_you_mean
from fastq.schedules import declared_by

__all__ = ["AppNotFound", "Asking", "ImportFailed", "Launch", "load_app", "plan", "report"]


ALL_QUEUES = "*"
"""In place of ``queues``: those of the application's tasks."""


class AppNotFound(ConfigError):
    """The application's path does not lead to a FastQ object."""


class ImportFailed(ConfigError):
    """The application cannot be imported; why has been written to stderr."""

    def __init__(self, app: str) -> None:
        super().__init__(f"the application {app or '(entry points)'} cannot be imported, see above")


class Launch(msgspec.Struct, frozen=True):
    """What every process of a fleet is started with.

    Attributes:
        settings: the ones in force, from :func:`plan`.
        app: ``package.module:attribute``; empty: the tasks of all entry points of the group ``fastq.tasks``.
    """

    settings: Settings
    app: str = ""


def load_app(launch: Launch) -> FastQ:
    """Import the application and give it the settings of this launch.

    Raises:
        AppNotFound: the path is malformed, or names a module or attribute that does not exist.
        Exception: whatever the application's modules raise while they are imported.
    """
    app = open_app(launch.app)
    app.adopt(launch.settings)
    return app


class Asking:
    """An application is asked for its settings: in a forked process, which imports it and ends.

    Args:
        app: as of :class:`Launch`.
        options: the command's options; those that are None were not given.
        file: the settings file, if it is not one that is looked for.
    """

    def __init__(self, app: str, options: Mapping[str, object], file: Path | None = None) -> None:
        self._app = app
        self._reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._reading)
            _leave_with_the_asker(writing)
            _answer(writing, app, options, file)
        os.close(writing)

    def poll(self) -> Launch | None:
        """The answer, or None as long as there is none; its process is a child of this one, whose end is a SIGCHLD.

        Raises:
            ConfigError: a setting, a task or a schedule cannot be used, or there is no such application.
            ImportFailed: the application cannot be imported; its own frames have been written to stderr.
        """
        return self._answered() if self._ended(os.WNOHANG) else None

    def wait(self) -> Launch:
        """The answer, however long it takes. Raises as :meth:`poll`."""
        self._ended(0)
        return self._answered()

    def close(self) -> None:
        """The answer is not wanted any more."""
        if self._reading >= 0:
            os.close(self._reading)
            self._reading = -1

    def _ended(self, how: int) -> bool:
        try:
            return os.waitpid(self._pid, how)[0] != 0
        except ChildProcessError:
            return True  # a supervisor's loop was quicker

    def _answered(self) -> Launch:
        answer = b""
        while chunk := os.read(self._reading, 65_536):
            answer += chunk
        self.close()
        if not answer:
            raise ImportFailed(self._app)
        said = msgspec.msgpack.decode(answer, type=Settings | str)
        if isinstance(said, str):
            raise ConfigError(said)
        return Launch(said, self._app)


def plan(app: str, options: Mapping[str, object], file: Path | None = None) -> Launch:
    """The application's settings with the command's options on top: :class:`Asking`, to its end. Raises as there."""
    return Asking(app, options, file).wait()


def _leave_with_the_asker(writing: int) -> None:
    """End this process when nobody reads the pipe any more: modules that never finish would outlive a SIGTERM."""

    def watch() -> None:
        door = select.poll()
        door.register(writing, 0)
        door.poll()
        os._exit(ExitCode.CRASH)

    threading.Thread(target=watch, name="fastq-asker", daemon=True).start()


def _answer(writing: int, app: str, options: Mapping[str, object], file: Path | None) -> None:
    """The forked process of :class:`Asking`: import, merge, write, end."""
    code = ExitCode.USAGE
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        given = {name: value for name, value in options.items() if value is not None}
        opened = open_app(app)
        if given.get("queues") == ALL_QUEUES:
            given["queues"] = ",".join(_queues_of(opened))
        settings = config.load(arguments={**opened.arguments, **given}, file=file).settings
        opened.settings = settings
        _check_limits(opened)
        declared_by(opened, app)  # a schedule whose arguments do not fit its task, say
        os.write(writing, msgspec.msgpack.encode(settings))
        code = ExitCode.OK
    except FastQError as error:
        os.write(writing, msgspec.msgpack.encode(str(error)))  # whoever asks tells it where it belongs
    except BaseException as error:  # noqa: BLE001 - whatever the modules of an application raise
        report(error, app)
    finally:
        os._exit(code)


def _check_limits(app: FastQ) -> None:
    """Tell of limits that do not exist, or do not fit their handlers, before a worker is forked."""
    for name, task in app.tasks.items():
        app.limits_of(name, app.queue_of(name, task.defaults.queue))


def _queues_of(app: FastQ) -> list[str]:
    """Every queue that the application's tasks go to, the default one first."""
    default = app.default_queue()
    return [default, *sorted({app.queue_of(task.name, task.defaults.queue) for task in app.tasks.values()} - {default})]


def open_app(path: str) -> FastQ:
    """The application at ``package.module:attribute``; empty: one with the tasks of all entry points. Raises as :func:`load_app`."""
    if path:
        return _find(path)
    app = FastQ()
    if not app.load_entry_points():
        raise AppNotFound(
            "no application was named and no installed package announces tasks: "
            "give package.module:app, or set FASTQ_APP"
        )
    return app


def _find(path: str) -> FastQ:
    module_name, _, attribute = path.partition(":")
    if module_name.endswith(".py"):
        module_name = _from_file(module_name)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name + ".").startswith(error.name + "."):
            raise AppNotFound(
                f"the application {path!r} was not found: no module named {error.name!r} in {os.getcwd()} or on the path"
            ) from None
        raise
    return _attribute(module, path, attribute)


def _from_file(path: str) -> str:
    """``jobs/app.py`` as a module of its folder."""
    folder, name = os.path.split(os.path.abspath(path))
    if not os.path.exists(os.path.join(folder, name)):
        raise AppNotFound(f"the application {path!r} was not found: no such file")
    sys.path.insert(0, folder)
    return name.removesuffix(".py")


def _attribute(module: ModuleType, path: str, attribute: str) -> FastQ:
    apps = {name: value for name, value in vars(module).items() if isinstance(value, FastQ)}
    if not attribute:
        if len(apps) == 1:
            return next(iter(apps.values()))
        raise AppNotFound(
            f"module {module.__name__!r} has {len(apps)} FastQ objects: name one, as {module.__name__}:app"
        )
    target: Any = module
    for part in attribute.split("."):
        target = getattr(target, part, None)
    if isinstance(target, FastQ):
        return target
    if target is None:
        raise AppNotFound(f"{path!r}: module {module.__name__!r} has no {attribute!r}{did_you_mean(attribute, apps)}")
    raise AppNotFound(f"{path!r} is of type {type(target).__name__}, not a fastq.FastQ{did_you_mean(attribute, apps)}")


def report(error: BaseException, app: str) -> None:
    """Tell on stderr why the application could not be imported: the user's own frames, nothing of ours."""
    if isinstance(error, FastQError):
        sys.stderr.write(f"fastq: {error}\n")
        return
    ours = os.path.dirname(__file__)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((ours, "<frozen importlib")) and "importlib" not in frame.filename
    ]
    lines = traceback.format_list(frames) + traceback.format_exception_only(error)
    sys.stderr.write(f"fastq: the application {app or '(entry points)'} cannot be imported\n{''.join(lines)}")
    sys.stderr.flush()
