"""A trial that may write only small files."""

import resource
import signal
import sys

from cgo import trial

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
sys.exit(trial.main())
