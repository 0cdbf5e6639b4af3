"""The arguments of a task on the wire: encoded and checked at the call, decoded into the annotated types at the run.

A body is the msgpack of an array (positional arguments) or of a map (keywords; positional ones, if any, under "").
What a call encodes is decoded once more with the worker's own decoder, so a wrong type is told where the call is.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints

import msgspec

from fastq.errors import BodyTooLarge, InvalidArguments, TaskDefinitionError, UndecodableJob, did_you_mean

__all__ = ["Arguments", "Returned", "encode_untyped", "hints_of", "untyped", "with_first"]

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_INDEX = re.compile(r" - at `\$\[(\d+)\]")


def encode_untyped(task: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes:
    """The body of a call by name, for a task whose signature is not known here.

    Raises:
        InvalidArguments: a value cannot be encoded.
    """
    body: Any = args if not kwargs else {"": args, **kwargs} if args else kwargs
    try:
        return _encode(body)
    except Exception as error:  # noqa: BLE001 - TypeError, OverflowError, RecursionError …: all the caller's
        raise InvalidArguments(f"an argument of task {task!r} cannot be encoded: {error}") from None


def untyped(body: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments as msgpack knows them.

    Raises:
        UndecodableJob: the body is neither an array nor a map of arguments.
    """
    try:
        value = _decode(body)
    except Exception as error:  # noqa: BLE001 - DecodeError, UnicodeDecodeError, RecursionError
        raise _undecodable(error) from None
    kwargs = value if isinstance(value, dict) else {}
    args = kwargs.pop("", []) if isinstance(value, dict) else value
    if not isinstance(args, list) or not all(isinstance(name, str) for name in kwargs):
        raise UndecodableJob("the body is neither an array nor a map of arguments")
    return tuple(args), kwargs


def with_first(task: str, body: bytes, first: Any) -> bytes:
    """The body of a call with another argument before the others; see :meth:`Arguments.encode_rest`.

    Raises:
        UndecodableJob: the body is neither an array nor a map of arguments.
    """
    args, kwargs = untyped(body)
    return encode_untyped(task, (first, *args), kwargs)


def check_size(task: str, body: bytes, most: int) -> bytes:
    """The body itself.

    Raises:
        BodyTooLarge: it has more than ``most`` bytes.
    """
    if len(body) > most:
        raise BodyTooLarge(
            f"the arguments of task {task!r} take {len(body):,} bytes, more than max_body={most:,}: "
            "store large data elsewhere and pass its key"
        )
    return body


class Arguments:
    """The signature of one task as a codec.

    Args:
        task: its name, for messages.
        fn: the handler.
        injected: tells by parameter and annotation which parameters fastq fills in (context, lifespan value).

    Raises:
        TaskDefinitionError: an annotation cannot be resolved or is of no use to msgspec.
    """

    def __init__(self, task: str, fn: Callable[..., Any], injected: Callable[[inspect.Parameter, Any], bool]) -> None:
        self.task = task
        self.injected: dict[str, inspect.Parameter] = {}
        signature = inspect.signature(fn)
        self._all = list(signature.parameters.values())
        hints = hints_of(task, fn)
        wanted = []
        for parameter in signature.parameters.values():
            if injected(parameter, hints.get(parameter.name)):
                self.injected[parameter.name] = parameter
            else:
                wanted.append(parameter)
        self._signature = signature.replace(parameters=wanted)
        self._types = {p.name: hints.get(p.name, Any) for p in wanted}
        positional = [p for p in wanted if p.kind in _POSITIONAL]
        self._names = [p.name for p in positional]
        self._least = sum(p.default is p.empty for p in positional)
        self._most = len(positional)
        kinds = {p.kind for p in wanted}
        ordinary = kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD}
        self._ordinary = {p.name: p.default for p in wanted if p.default is not p.empty} if ordinary else None
        self._variadic = inspect.Parameter.VAR_POSITIONAL in kinds
        self._simple = not self._variadic and not any(
            p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is p.empty for p in wanted
        )
        self._decode_by_count: list[Callable[[bytes], tuple[Any, ...]]]
        self._decode_by_count = [self._decoder(n).decode for n in range(self._most + 1)]

    @property
    def decoders(self) -> tuple[list[Callable[[bytes], tuple[Any, ...]]] | None, int, int]:
        """For bodies that are arrays of n arguments: what decodes them, by n, and the least and the most n; None if that is
        not enough for this signature. Whatever they raise, :meth:`decode` raises in our words.
        """
        return self._decode_by_count if self._simple else None, self._least, self._most

    @property
    def signature(self) -> inspect.Signature:
        """The parameters that a call fills: those of the handler without the injected ones."""
        return self._signature

    @property
    def names(self) -> list[str]:
        """The parameters that positional arguments of a call fill, in order."""
        return self._names

    def _decoder(self, count: int) -> msgspec.msgpack.Decoder[tuple[Any, ...]]:
        types = tuple(self._types[name] for name in self._names[:count])
        try:
            return msgspec.msgpack.Decoder(tuple[types] if types else tuple[()])  # type: ignore[valid-type]  # built at run time
        except Exception as error:  # noqa: BLE001 - whatever an annotation can provoke
            raise TaskDefinitionError(f"task {self.task!r} has an annotation that cannot be decoded: {error}") from None

    # -- the call -------------------------------------------------------------------------

    def encode(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
        """Bind the arguments of a call, encode them and check their types.

        Raises:
            InvalidArguments: naming the parameter and what is wrong with it.
        """
        if kwargs or not self._simple or not self._least <= len(args) <= self._most:
            args, kwargs = self._bind(args, kwargs)
        else:
            try:
                body = _encode(args)
                self._decode_by_count[len(args)](body)
            except Exception:  # noqa: BLE001, S110 - what is wrong is said below
                pass
            else:
                return body
        body = encode_untyped(self.task, args, kwargs)
        self.decode(body)
        return body

    def encode_rest(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
        """As :meth:`encode`, of a call whose first argument comes later: the others only are bound, and typed when it runs.

        Raises:
            InvalidArguments: they do not fit, or there is no room for another one.
        """
        args, kwargs = self._bind((None, *args), kwargs)
        return encode_untyped(self.task, args[1:], kwargs)

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, defaults filled in: calls that mean the same are equal.

        Raises:
            InvalidArguments: they do not fit the signature.
        """
        if self._ordinary is not None and len(args) <= self._most:
            named = {**self._ordinary, **dict(zip(self._names, args, strict=False)), **kwargs}
            if len(named) == self._most:  # else an argument is missing, or unknown: bind says which
                return named
        args, kwargs = self._bind(args, kwargs)
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            kinds = {parameter.kind for parameter in self._signature.parameters.values()}
            takes_any = inspect.Parameter.VAR_KEYWORD in kinds
            unknown = "" if takes_any else next((name for name in kwargs if name not in self._types), "")
            why = f"no argument {unknown!r}{did_you_mean(unknown, self._types)}" if unknown else str(error)
            raise InvalidArguments(f"task {self.task!r}: {why}; its signature is {self._signature}") from None
        positional: list[Any] = []
        for name in self._names:
            if name not in bound.arguments:
                break
            positional.append(bound.arguments.pop(name))
        if self._variadic:
            positional += bound.arguments.pop(self._variadic_name(), ())
        rest = dict(bound.arguments)
        for parameter in self._signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                rest.update(rest.pop(parameter.name, {}))
        return tuple(positional), rest

    def _variadic_name(self) -> str:
        kinds = self._signature.parameters.values()
        return next(p.name for p in kinds if p.kind is inspect.Parameter.VAR_POSITIONAL)

    # -- the run --------------------------------------------------------------------------

    def decode(self, body: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments in the annotated types.

        Raises:
            UndecodableJob: the body is not msgpack of the right shape.
            InvalidArguments: it does not fit the signature.
        """
        count = _array_length(body)
        if count is not None and self._simple and self._least <= count <= self._most:
            try:
                return self._decode_by_count[count](body), {}
            except msgspec.ValidationError as error:
                raise self._misfit(error) from None
            except Exception as error:  # noqa: BLE001 - DecodeError, UnicodeDecodeError, RecursionError
                raise _undecodable(error) from None
        return self._decode_any(body)

    def _decode_any(self, body: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = untyped(body)
        positional, rest = self._bind(args, kwargs)
        named = dict(zip(self._names, positional, strict=False))
        extra = self._types.get(self._variadic_name(), Any) if self._variadic else Any
        typed = [self._convert(name, value, self._types[name]) for name, value in named.items()]
        typed += [self._convert("*", value, extra) for value in positional[len(typed) :]]
        keyword_type = next(
            (self._types[p.name] for p in self._signature.parameters.values() if p.kind is p.VAR_KEYWORD), Any
        )
        return tuple(typed), {k: self._convert(k, v, self._types.get(k, keyword_type)) for k, v in rest.items()}

    def place(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], fill: Callable[[inspect.Parameter], Any]
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        """The arguments of a call with the injected parameters put in their places."""
        given, placed = iter(args), []
        left = len(args)
        for parameter in self._all:
            if parameter.name in self.injected:
                if left and parameter.kind in _POSITIONAL:
                    placed.append(fill(parameter))
                else:
                    kwargs[parameter.name] = fill(parameter)
            elif left and parameter.kind in _POSITIONAL:
                placed.append(next(given))
                left -= 1
        placed += given
        return placed, kwargs

    def _convert(self, name: str, value: Any, wanted: Any) -> Any:
        if wanted is Any:
            return value
        try:
            return msgspec.convert(value, wanted)
        except Exception as error:  # noqa: BLE001 - also what a user's own type raises
            raise InvalidArguments(f"argument {name!r} of task {self.task!r}: {error}") from None

    def _misfit(self, error: msgspec.ValidationError) -> InvalidArguments:
        match = _INDEX.search(str(error))
        name = self._names[int(match[1])] if match else "?"
        return InvalidArguments(f"argument {name!r} of task {self.task!r}: {str(error).split(' - at `$')[0]}")


class Returned:
    """What a handler says it returns: results come back as msgpack knows them, and leave here in the annotated type.

    A type that msgspec does not know (a class of one's own that is no dataclass) leaves values as they are.
    """

    def __init__(self, task: str, fn: Callable[..., Any]) -> None:
        self.task = task
        self.type = hints_of(task, fn).get("return", Any)

    def convert(self, value: Any) -> Any:
        """The value in the annotated type.

        Raises:
            UndecodableJob: it does not fit.
        """
        if self.type is Any:
            return value
        try:
            return msgspec.convert(value, self.type)
        except TypeError:
            return value
        except Exception as error:  # noqa: BLE001 - also what a user's own type raises
            shown = getattr(self.type, "__name__", self.type)
            raise UndecodableJob(f"the result of task {self.task!r} is not the {shown} that it says: {error}") from None


def _undecodable(error: Exception) -> UndecodableJob:
    return UndecodableJob(f"the arguments cannot be decoded: {type(error).__name__}: {error}")


def hints_of(task: str, fn: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a handler, resolved.

    Raises:
        TaskDefinitionError: one cannot be.
    """
    target = fn if inspect.isfunction(fn) or inspect.ismethod(fn) else getattr(fn, "__call__", fn)  # noqa: B004 - a callable object's hints are on its __call__
    try:
        return get_type_hints(target, include_extras=True)
    except Exception as error:  # noqa: BLE001 - an annotation is an expression: it may raise anything
        raise TaskDefinitionError(
            f"an annotation of task {task!r} cannot be resolved ({error}): "
            "import the name at run time, not only under TYPE_CHECKING"
        ) from None


def _array_length(body: bytes) -> int | None:
    """The number of elements if the msgpack value is an array."""
    if not body:
        return None
    first = body[0]
    if 0x90 <= first <= 0x9F:
        return first & 0x0F
    if first == 0xDC:
        return int.from_bytes(body[1:3], "big")
    if first == 0xDD:
        return int.from_bytes(body[1:5], "big")
    return None
