#!/usr/bin/env python3
"""Exit with 0 when the server at HEALTH_URL responds, or when no HEALTH_URL is set.

The password is sent where there is one: PREFECT_API_AUTH_STRING, or the file that PREFECT_API_AUTH_STRING_FILE names.
"""

from __future__ import annotations

import base64
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

TIMEOUT_S = 8.0


def is_healthy(url: str) -> bool:
    """Send one request; any response of 2xx is healthy."""
    request = urllib.request.Request(url)
    file = os.environ.get("PREFECT_API_AUTH_STRING_FILE")
    password = os.environ.get("PREFECT_API_AUTH_STRING") or (Path(file).read_text().strip() if file else "")
    if password:
        request.add_header("Authorization", "Basic " + base64.b64encode(password.encode()).decode())
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_S) as response:
            return 200 <= response.status < 300
    except OSError as error:
        print(f"{url}: {error}", file=sys.stderr)
        return False


if __name__ == "__main__":
    address = os.environ.get("HEALTH_URL")
    sys.exit(0 if not address or is_healthy(address) else 1)
