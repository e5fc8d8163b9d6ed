"""An S3 server on loopback, with a bucket, and the variables by which clients find it."""

import contextlib
from collections.abc import Iterator

import pytest

KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key", "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def serving(bucket: str) -> Iterator[str]:
    """Serve a bucket, and give the server's address."""
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        address = f"http://{host}:{port}"
        login = {"aws_access_key_id": KEYS["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": KEYS["AWS_SECRET_ACCESS_KEY"]}
        boto3.client("s3", endpoint_url=address, region_name=KEYS["AWS_DEFAULT_REGION"], **login).create_bucket(
            Bucket=bucket
        )
        yield address
    finally:
        server.stop()
