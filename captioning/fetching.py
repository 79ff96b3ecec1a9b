"""Files from the web, fetched within bounds of size and time, and zip archives, unpacked whole or not at all."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import socket
import threading
import zipfile
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import httpx
from tqdm import tqdm

from captioning.errors import InputError

ATTEMPTS = 5  # in a row that fetch less than a chunk
RETRY_SECONDS = 0.5  # doubled after every failure
TIMEOUT_SECONDS = 30.0  # to connect and get the headers; also the body's allowed delay
SLOWEST_BYTES = 10_000  # per second
REDIRECTS = 5
CHUNK_BYTES = 1 << 20


class NetworkError(Exception):
    """A request failed; `permanent` when another attempt would not help."""

    def __init__(self, reason: str, permanent: bool = False):
        super().__init__(reason)
        self.permanent = permanent


class Progress:
    """A progress bar over tasks that run at once, and the signal for their threads to stop."""

    def __init__(self, total: int, unit: str, **options: Any):
        self._bar = tqdm(total=total, unit=unit, disable=None, **options)
        self.stop = threading.Event()

    def advance(self, amount: int) -> None:
        """Move the bar."""
        self._bar.update(amount)

    async def run(self, tasks: Sequence[Callable[[], Awaitable[Any]]], at_once: int) -> list[Any]:
        """Return the results of all tasks; the first error stops the others, and so does Ctrl-C."""
        results: list[Any] = [None] * len(tasks)
        waiting = iter(enumerate(tasks))

        async def work() -> None:
            for index, task in waiting:
                results[index] = await task()

        workers = [asyncio.ensure_future(work()) for _ in range(min(at_once, len(tasks)))]
        try:
            await asyncio.gather(*workers)
        finally:
            self.stop.set()
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            self._bar.close()
        return results


# Requests


def connect() -> httpx.AsyncClient:
    """Build a client that keeps its connections and asks for bodies as they are, not compressed."""
    headers = {"User-Agent": "image-captioning", "Accept-Encoding": "identity"}
    return httpx.AsyncClient(headers=headers, timeout=TIMEOUT_SECONDS)


def describe_error(error: BaseException) -> str:
    """Say in a few words why a request failed."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, socket.gaierror):
            return "no network, or no server of this name"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, (httpx.TimeoutException, asyncio.TimeoutError)):
        return "the server is too slow"
    if isinstance(error, httpx.UnsupportedProtocol):
        return "it redirects to an address that is not http or https"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"the server cannot be reached: {text}" if isinstance(error, httpx.ConnectError) else text


@contextmanager
def _network_errors() -> Iterator[None]:
    try:
        yield
    except NetworkError:
        raise
    except (httpx.HTTPError, httpx.InvalidURL, asyncio.TimeoutError) as error:
        permanent = isinstance(error, (httpx.UnsupportedProtocol, httpx.InvalidURL))
        raise NetworkError(describe_error(error), permanent) from error
    except Exception as error:  # odd addresses make the libraries below httpx raise nearly anything
        raise NetworkError(f"the address or the answer cannot be used ({type(error).__name__})") from error


@asynccontextmanager
async def _request(client: httpx.AsyncClient, url: str, start: int = 0) -> AsyncIterator[httpx.Response]:
    """Ask for a file from byte `start` on; yields the response before its body is read."""
    with _network_errors():  # httpx would read the whole body of a redirect
        request = client.build_request("GET", url, headers={"Range": f"bytes={start}-"} if start else {})
        for _ in range(1 + REDIRECTS):
            response = await asyncio.wait_for(client.send(request, stream=True), TIMEOUT_SECONDS)
            if response.next_request is None:
                break
            await response.aclose()
            request = response.next_request
        else:
            raise NetworkError(f"it redirects more than {REDIRECTS} times", permanent=True)
    try:
        status = response.status_code
        if status not in (200, 206):
            gone = 300 <= status < 500 and status not in (408, 429)
            reason = f"the server answers {status} {httpx.codes.get_reason_phrase(status)}".rstrip()
            raise NetworkError(reason, permanent=gone)
        if start and status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise NetworkError("the server sends another part than it was asked for", permanent=True)
        yield response
    finally:
        await response.aclose()


async def _chunks(response: httpx.Response, at_most: int) -> AsyncIterator[bytes]:
    """Yield the body; raises `NetworkError` if it is longer than `at_most` bytes or too slow."""
    clock = asyncio.get_running_loop().time
    received, deadline = 0, clock() + TIMEOUT_SECONDS
    with _network_errors():
        body = response.aiter_raw()
        while chunk := await asyncio.wait_for(anext(body, b""), deadline + received / SLOWEST_BYTES - clock()):
            received += len(chunk)
            if received > at_most:
                raise NetworkError(f"the server sends more than {at_most:,} bytes", permanent=True)
            yield chunk


async def read(client: httpx.AsyncClient, url: str, at_most: int) -> bytes:
    """Download a file of at most `at_most` bytes into memory.

    Raises `NetworkError` where it is not to be had, and `InputError` after several failed attempts.
    """
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            await asyncio.sleep(RETRY_SECONDS * 2**attempt)
        try:
            async with _request(client, url) as response:
                return b"".join([chunk async for chunk in _chunks(response, at_most)])
        except NetworkError as error:
            if error.permanent:
                raise
            reason = str(error)
    raise InputError(f"{url} cannot be downloaded: {reason}; run the same command again to resume.")


async def fetch(
    client: httpx.AsyncClient, url: str, path: Path, size: int, sha256: str, progress: Progress | None = None
) -> None:
    """Download `url` to `path`, resuming from `path`.part where an earlier attempt left one.

    Args:
        size: Number of bytes that the file has to have.
        sha256: Their checksum.
        progress: A bar over bytes.

    Raises:
        InputError: The server has another file, or cannot be reached after several attempts.
    """
    progress = progress or Progress(size, "B", unit_scale=True, desc=path.name)
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    progress.advance(min(have, size))
    failures = 0
    while have < size:
        reason, before = "the connection broke", have
        try:
            async with _request(client, url, have) as response:
                if response.status_code == 200:  # a server without ranges sends the whole file again
                    progress.advance(-have)
                    have = 0
                length = response.headers.get("Content-Length", "")
                if length and length.lstrip("0") != str(size - have):
                    raise InputError(f"{url} is another file than the published one of {size:,} bytes.")
                with part.open("ab" if have else "wb") as file:
                    async for chunk in _chunks(response, size - have):
                        file.write(chunk)
                        have += len(chunk)
                        progress.advance(len(chunk))
        except NetworkError as error:
            reason = str(error)
            if error.permanent:
                raise InputError(f"{url} cannot be downloaded: {reason}.") from error
        failures = 0 if have - before >= min(CHUNK_BYTES, size - before) else failures + 1
        if failures == ATTEMPTS:
            raise InputError(f"{url} cannot be downloaded: {reason}; run the same command again to resume.")
        if have < size:
            await asyncio.sleep(RETRY_SECONDS * 2**failures)
    digest = await asyncio.to_thread(_hash, part, progress.stop)
    if digest != sha256:
        part.unlink()
        raise InputError(
            f"{url} came with the SHA-256 {digest} where {sha256} should be, and was deleted; run the same command "
            "again."
        )
    os.replace(part, path)


def _hash(path: Path, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    total = path.stat().st_size
    bar = tqdm(total=total, desc=f"checking {path.stem}", unit="B", unit_scale=True, disable=None, leave=False)
    with path.open("rb") as file, bar:
        while (chunk := file.read(CHUNK_BYTES)) and not stop.is_set():
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


# Archives


def require_space(folder: Path, needed: int) -> None:
    """Raise `InputError` if the disk of `folder`, which need not exist yet, has less than `needed` bytes free."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"{folder} needs {needed / 1e9:.1f} GB of free disk space and has {free / 1e9:.1f} GB; "
            "free some, or name a folder on another disk."
        )


def extract(
    archive: Path, members: dict[str, Path], at_most: int | None = None, stop: threading.Event | None = None
) -> None:
    """Unpack `members` of a zip: each whole or, when anything goes wrong, not at all.

    Args:
        members: A file's name in the archive, or a folder's with its closing slash -> where it goes.
        at_most: Number of bytes that they may have together.
        stop: Ends the unpacking early, as an error does.

    Raises:
        InputError: The archive is damaged, lacks a member, is larger than `at_most`, does not fit on the disk, or
            has a name that leads out of its folder.
    """
    temporary = archive.with_name(archive.name + ".unpacking")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as file:
            chosen = _choose_members(file, archive.name, members, temporary)
            total = sum(info.file_size for info, _ in chosen)
            if at_most is not None and total > at_most:
                raise InputError(f"{archive.name} unpacks to {total:,} bytes, more than the {at_most:,} expected.")
            require_space(archive.parent, total)
            for info, path in tqdm(chosen, desc=archive.name, unit="file", disable=None, leave=False):
                if stop and stop.is_set():
                    return
                path.parent.mkdir(parents=True, exist_ok=True)
                with file.open(info) as source, path.open("wb") as target:  # checks the CRC
                    shutil.copyfileobj(source, target, CHUNK_BYTES)
        for index, target_path in enumerate(members.values()):
            target_path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / str(index), target_path)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{archive} is not a whole zip archive: {error}; delete it.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _choose_members(
    file: zipfile.ZipFile, archive: str, members: dict[str, Path], temporary: Path
) -> list[tuple[zipfile.ZipInfo, Path]]:
    """Find the entries of a zip that belong to `members`, and where each is unpacked: `temporary`/index/name."""
    chosen: list[tuple[zipfile.ZipInfo, Path]] = []
    for info in file.infolist():
        name = PurePosixPath(info.filename)
        if name.is_absolute() or ".." in name.parts or "\\" in info.filename or ":" in info.filename:
            raise InputError(f"{archive} wants to write outside of its folder ({name}).")
        for index, member in enumerate(members):
            if info.filename == member and not info.is_dir():
                chosen.append((info, temporary / str(index)))
            elif member.endswith("/") and info.filename.startswith(member) and not info.is_dir():
                chosen.append((info, temporary / str(index) / name.relative_to(PurePosixPath(member))))
    for index, member in enumerate(members):
        if not any(path.is_relative_to(temporary / str(index)) for _, path in chosen):
            raise InputError(f"{archive} holds no {member}.")
    return chosen
