"""Where runs may lie: a folder, or the address of an object store, which the environment holds the keys to."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from pyarrow import fs

from tpaw_ray.errors import RunError

ATTEMPTS = 9
"""How often a request to S3 is made before the store counts as gone: over a minute, the waits in between grow to 20 s."""
_GO_ON = "the same command continues the run"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def open_address(root: str) -> tuple[str, str, fs.FileSystem]:
    """The scheme of an address (empty for a folder), the address made whole, and the file system that it speaks of.

    Credentials and endpoint of S3 are those of the environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`,
    `AWS_ENDPOINT_URL`), a profile or the machine's role; those of GCS what `GOOGLE_APPLICATION_CREDENTIALS` names.

    Raises:
        RunError: for a scheme that is not known, for an address that holds more than bucket and prefix, which may be a secret, so
            that it is not repeated, and for one with an empty name in it.
    """
    scheme, mark, path = root.partition("://")
    if not mark or scheme == "file":
        return "", os.path.realpath(os.path.expanduser(path if mark else root)), fs.LocalFileSystem()
    if scheme not in ("s3", "gs"):
        raise RunError(f"run.root: found an address of {scheme!r}; expected a folder, s3://bucket/prefix or gs://bucket/prefix")
    bucket = path.split("/")[0]
    if not bucket or set("@?#") & set(path) or ":" in bucket:
        raise RunError(
            f"run.root: found more than bucket and prefix; expected {scheme}://bucket/prefix. Keys and endpoint are taken from "
            "the environment, as in AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"
        )
    if "" in path.rstrip("/").split("/"):
        raise RunError(f"run.root: found an empty name in the prefix, as in a//b; expected {scheme}://bucket/prefix")
    filesystem = _s3(bucket) if scheme == "s3" else fs.GcsFileSystem()
    return f"{scheme}://", root.rstrip("/"), filesystem


def _s3(bucket: str) -> fs.FileSystem:
    # pyarrow's constructor reads neither the endpoint nor, for want of a region, asks for the bucket's.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not (endpoint or region):
        with told(f"s3://{bucket}", "reached"):
            region = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(
        endpoint_override=endpoint, region=region, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS)
    )


@contextmanager
def told(path: str, done: str) -> Iterator[None]:
    """Say what the system says of a path to the user: that it cannot be `done`, why, and what to do.

    Raises:
        RunError: in place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"{path[:1000]}: cannot be {done}: {_reason(path, error)}") from error


def _reason(path: str, error: OSError) -> str:
    if error.errno in _FULL:
        return f"no space is left on the device; free some, then {_GO_ON}"
    if isinstance(error, FileNotFoundError):
        return f"there is no such file or bucket ({error})"
    if "://" in path:
        return f"{error}; once the store answers and lets you in, {_GO_ON}"
    return os.strerror(error.errno) if error.errno else str(error)
