"""A TCP proxy that breaks connections the way networks do: cut, silent, late, or without the answer."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import ssl
    from collections.abc import Coroutine
    from types import TracebackType
    from typing import Any

CHUNK = 65_536
PATIENCE_S = 20.0


@dataclass
class Trap:
    """Something that happens to the first connection that says (or is told) certain bytes."""

    request: bytes | None
    answer: bytes | None
    holds: bool
    sprung: threading.Event = field(default_factory=threading.Event)
    """The fault has happened: the answer is lost, or the request is held."""
    arrived: threading.Event = field(default_factory=threading.Event)
    """A held request has reached the server after all, and was answered."""
    go: asyncio.Event = field(default_factory=asyncio.Event)
    answered: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False)
class _Line:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    armed: Trap | None = None


class Proxy:
    """Stands between a client and the server on `port`; in a thread of its own. With `tls` its own side speaks TLS."""

    def __init__(self, port: int, *, tls: ssl.SSLContext | None = None) -> None:
        self._server_port = port
        self._tls = tls
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._lines: set[_Line] = set()
        self._traps: list[Trap] = []
        self._held: list[Trap] = []
        self._flowing = asyncio.Event()
        self._refusing = False
        self._listener: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()

    def lead_to(self, port: int) -> None:
        """Take new connections to another server, as an address that was switched; open ones stay where they are."""
        self._server_port = port

    def cut(self) -> None:
        """End every connection at once; new ones are taken."""
        self._call(self._cut())

    def refuse(self, *, refusing: bool) -> None:
        """Take no new connections, or take them again."""
        self._refusing = refusing

    def freeze(self) -> None:
        """Forward nothing more, either way; every socket stays open, as if the other side were gone."""
        self._call(self._set_flowing(flowing=False))

    def thaw(self) -> None:
        """Forward again, what was held back first."""
        self._call(self._set_flowing(flowing=True))

    def lose_answer(self, *, request: bytes | None = None, answer: bytes | None = None) -> threading.Event:
        """Cut the first connection on which `request` was sent, or `answer` comes back, before its answer.

        The server has done what was asked; its client cannot know. Returns what is set once it has happened.
        """
        trap = Trap(request, answer, holds=False)
        self._traps.append(trap)
        return trap.sprung

    def hold(self, request: bytes) -> Trap:
        """Keep the first such request back, alone; `let_go` sends it, however late."""
        trap = Trap(request, None, holds=True)
        self._traps.append(trap)
        self._held.append(trap)
        return trap

    def let_go(self, trap: Trap) -> None:
        """Send a held request to the server and wait until it has answered."""
        self._loop.call_soon_threadsafe(trap.go.set)
        if not trap.arrived.wait(PATIENCE_S):
            raise TimeoutError("the held request was not answered")

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE_S)

    async def _listen(self) -> None:
        self._flowing.set()
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        self._flowing.set()
        for trap in self._held:
            trap.go.set()
            trap.answered.set()
        await self._cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _cut(self) -> None:
        for line in list(self._lines):
            _end(line)

    async def _set_flowing(self, *, flowing: bool) -> None:
        if flowing:
            self._flowing.set()
        else:
            self._flowing.clear()

    async def _accept(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self._refusing:
            to_client.close()
            return
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._server_port)
        except OSError:
            to_client.close()
            return
        line = _Line(to_client, to_server)
        self._lines.add(line)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._requests(line, from_client))
                both.create_task(self._answers(line, from_server))
        finally:
            self._lines.discard(line)
            _end(line)

    async def _requests(self, line: _Line, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):
            while chunk := await reader.read(CHUNK):
                await self._flowing.wait()
                trap = next((t for t in self._traps if t.request is not None and t.request in chunk), None)
                if trap is not None:
                    self._traps.remove(trap)
                    line.armed = trap
                    if trap.holds:
                        trap.sprung.set()
                        await trap.go.wait()
                line.server.write(chunk)
                await line.server.drain()
                if trap is not None and trap.holds:
                    # Its client has left long ago; without this wait the server would be left too.
                    await trap.answered.wait()
        line.server.close()

    async def _answers(self, line: _Line, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):
            while chunk := await reader.read(CHUNK):
                await self._flowing.wait()
                trap = next((t for t in self._traps if t.answer is not None and t.answer in chunk), None)
                if trap is not None:
                    self._traps.remove(trap)
                    line.armed = trap
                if line.armed is not None:
                    if not line.armed.holds:
                        line.armed.sprung.set()
                        _end(line)
                        return
                    line.armed.arrived.set()
                    line.armed.answered.set()
                    line.armed = None
                line.client.write(chunk)
                await line.client.drain()
        line.client.close()


def _end(line: _Line) -> None:
    for writer in (line.client, line.server):
        with suppress(OSError, RuntimeError):
            writer.transport.abort()
