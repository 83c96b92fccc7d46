"""``python -m deploy.app`` in a checkout, ``python3 /opt/holoscan/app`` in the image."""

import os
import resource
import sys
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before anything imports ONNX Runtime
# Holoscan wants 32 MiB and warns on every import otherwise
_soft, _hard = resource.getrlimit(resource.RLIMIT_STACK)
if _soft != resource.RLIM_INFINITY and _soft < 32 << 20:
    resource.setrlimit(resource.RLIMIT_STACK, (min(32 << 20, _hard) if _hard > 0 else 32 << 20, _hard))
# The image starts this folder itself: the modules beside this one are imported by their own names, there and here
sys.path.insert(0, str(Path(__file__).resolve().parent))

from slide_app import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv))
