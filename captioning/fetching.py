"""Download files within limits of size and time, and unpack zip archives atomically."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
import threading
import zipfile
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import httpx
from tqdm import tqdm

from captioning.errors import InputError, is_offline
from captioning.files import format_bytes, is_within

ATTEMPTS = 5  # maximum number of consecutive attempts that fetch less than a chunk
RETRY_SECONDS = 0.5  # first delay before another attempt, doubled after every failure
TIMEOUT_SECONDS = 30.0  # time limit for connecting and getting the headers, and delay allowed for the body
MIN_BYTES_PER_SECOND = 10_000  # minimum speed of a body
MAX_REDIRECTS = 5
CHUNK_BYTES = 1 << 20


class NetworkError(Exception):
    """A request failed; `permanent` when another attempt would not help."""

    def __init__(self, reason: str, permanent: bool = False):
        super().__init__(reason)
        self.permanent = permanent


class ConcurrentTasks:
    """Tasks that run concurrently, with one progress bar and one signal for their threads to stop."""

    def __init__(self, total: int, unit: str, **options: Any):
        self._bar = tqdm(total=total, unit=unit, disable=None, **options)
        self.stop = threading.Event()

    def advance(self, amount: int) -> None:
        """Advance the progress bar."""
        self._bar.update(amount)

    async def run(self, tasks: Sequence[Callable[[], Awaitable[Any]]], max_concurrent: int) -> list[Any]:
        """Run all tasks and return their results; the first error stops the others, and so does Ctrl-C."""
        results: list[Any] = [None] * len(tasks)
        waiting = iter(enumerate(tasks))

        async def work() -> None:
            for index, task in waiting:
                results[index] = await task()

        workers = [asyncio.ensure_future(work()) for _ in range(min(max_concurrent, len(tasks)))]
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
    """Build a client that keeps its connections open and requests uncompressed bodies.

    Raises `InputError` for a proxy that cannot be used.
    """
    headers = {"User-Agent": "image-captioning", "Accept-Encoding": "identity"}
    try:
        return httpx.AsyncClient(headers=headers, timeout=TIMEOUT_SECONDS)
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        reason = str(error).split(". ")[0].rstrip(".")
        raise InputError(
            f"the proxy settings (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY or the system's) cannot be used "
            f"({reason}); name a proxy with http://, or with socks5:// after `pip install 'httpx[socks]'`."
        ) from None


def describe_http_error(error: BaseException) -> str:
    """Describe in a few words why a request failed."""
    if is_offline(error):
        return "no network, or no server of this name"
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
        raise NetworkError(describe_http_error(error), permanent) from error
    except Exception as error:  # malformed addresses make the libraries below httpx raise nearly anything
        raise NetworkError(f"the address or the answer cannot be used ({type(error).__name__})") from error


@asynccontextmanager
async def _request(client: httpx.AsyncClient, url: str, start: int = 0) -> AsyncIterator[httpx.Response]:
    """Request a file from byte `start` on; yields the response before its body is read."""
    with _network_errors():  # httpx would read the whole body of a redirect
        request = client.build_request("GET", url, headers={"Range": f"bytes={start}-"} if start else {})
        for _ in range(1 + MAX_REDIRECTS):
            response = await asyncio.wait_for(client.send(request, stream=True), TIMEOUT_SECONDS)
            if response.next_request is None:
                break
            await response.aclose()
            request = response.next_request
        else:
            raise NetworkError(f"it redirects more than {MAX_REDIRECTS} times", permanent=True)
    try:
        status = response.status_code
        if status not in (200, 206):
            gone = 300 <= status < 500 and status not in (408, 429)
            reason = f"the server answers {status} {httpx.codes.get_reason_phrase(status)}".rstrip()
            raise NetworkError(reason, permanent=gone)
        if start and status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise NetworkError("the server sent a different part of the file than requested", permanent=True)
        yield response
    finally:
        await response.aclose()


async def _chunks(response: httpx.Response, at_most: int) -> AsyncIterator[bytes]:
    """Yield the body; raises `NetworkError` if it is longer than `at_most` bytes or too slow."""
    clock = asyncio.get_running_loop().time
    received, deadline = 0, clock() + TIMEOUT_SECONDS
    with _network_errors():
        body = response.aiter_raw()
        while chunk := await asyncio.wait_for(anext(body, b""), deadline + received / MIN_BYTES_PER_SECOND - clock()):
            received += len(chunk)
            if received > at_most:
                raise NetworkError(f"the server sends more than {at_most:,} bytes", permanent=True)
            yield chunk


async def read(client: httpx.AsyncClient, url: str, at_most: int) -> bytes:
    """Download a file of at most `at_most` bytes into memory.

    Raises `NetworkError` where another attempt would not help, and `InputError` after several failed attempts.
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
    client: httpx.AsyncClient, url: str, path: Path, size: int, sha256: str, tasks: ConcurrentTasks
) -> None:
    """Download `url` to `path`, resuming from `path`.part where an earlier attempt left one.

    Args:
        size: expected number of bytes.
        sha256: expected checksum.
        tasks: the tasks that this download is one of; their progress bar counts bytes.

    Raises `InputError` where the server has a different file, or cannot be reached after several attempts.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    if have > size:  # it is of another file
        part.unlink()
        have = 0
    tasks.advance(have)
    failures = 0
    while have < size:
        reason, before = "the connection broke", have
        try:
            async with _request(client, url, have) as response:
                if response.status_code == 200:  # a server without ranges sends the whole file again
                    tasks.advance(-have)
                    have = 0
                begun = have
                length = response.headers.get("Content-Length", "")
                if length and length.lstrip("0") != str(size - have):
                    raise InputError(f"{url} is not the published file of {size:,} bytes.")
                with part.open("ab" if have else "wb") as file:
                    async for chunk in _chunks(response, size - have):
                        file.write(chunk)
                        have += len(chunk)
                        tasks.advance(len(chunk))
                if not length and have < size:  # another page, such as a hotel's, or the file until it was cut off
                    os.truncate(part, begun)
                    tasks.advance(begun - have)
                    have, reason = begun, "the server sent something other than the file"
        except NetworkError as error:
            reason = str(error)
            if error.permanent:
                raise InputError(f"{url} cannot be downloaded: {reason}.") from error
        failures = 0 if have - before >= min(CHUNK_BYTES, size - before) else failures + 1
        if failures == ATTEMPTS:
            raise InputError(f"{url} cannot be downloaded: {reason}; run the same command again to resume.")
        if have < size:
            await asyncio.sleep(RETRY_SECONDS * 2**failures)
    digest = await asyncio.to_thread(_hash, part, tasks.stop)
    if digest != sha256:
        part.unlink()
        raise InputError(
            f"{url} has the SHA-256 {digest} instead of {sha256}, and was deleted; run the same command again."
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
            f"{folder} needs {format_bytes(needed)} of free disk space and has {format_bytes(free)}; "
            "free some, or name a folder on another disk."
        )


def extract(
    archive: Path, members: dict[str, Path], at_most: int | None = None, stop: threading.Event | None = None
) -> None:
    """Unpack `members` of a zip archive, each of them atomically.

    Args:
        members: a file's name in the archive, or a folder's with its closing slash -> destination.
        at_most: maximum number of bytes of all members together.
        stop: event that ends the unpacking early, as an error does.

    Raises `InputError` where the archive is damaged, lacks a member, is larger than `at_most`, does not fit on the
    disk, or has a name that leads out of its folder.
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
            move_into_place(temporary / str(index), target_path)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{archive} is not an intact zip archive: {error}; delete it.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_into_place(source: Path, target: Path) -> None:
    """Move a file or folder atomically, also to another disk, as where images/ is a link to one."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copied = target.with_name(f".{target.name}.copying")
        shutil.rmtree(copied, ignore_errors=True)
        shutil.move(source, copied)
        os.replace(copied, target)


def _choose_members(
    file: zipfile.ZipFile, archive: str, members: dict[str, Path], temporary: Path
) -> list[tuple[zipfile.ZipInfo, Path]]:
    """Find the entries of a zip archive that belong to `members`; each is unpacked to `temporary`/index/name."""
    chosen: list[tuple[zipfile.ZipInfo, Path]] = []
    for info in file.infolist():
        name = PurePosixPath(info.filename)
        if not is_within(info.filename) or "\\" in info.filename or ":" in info.filename:
            raise InputError(f"{archive} has an entry that would be written outside of its folder ({name}).")
        for index, member in enumerate(members):
            if info.filename == member and not info.is_dir():
                chosen.append((info, temporary / str(index)))
            elif member.endswith("/") and info.filename.startswith(member) and not info.is_dir():
                chosen.append((info, temporary / str(index) / name.relative_to(PurePosixPath(member))))
    for index, member in enumerate(members):
        if not any(path.is_relative_to(temporary / str(index)) for _, path in chosen):
            raise InputError(f"{archive} holds no {member}.")
    return chosen
