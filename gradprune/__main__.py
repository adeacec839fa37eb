"""The `gradprune` command, also `python -m gradprune`, as torchrun starts it."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until `main` listens, Ctrl-C ends the imports as other signals do, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from gradprune.cli import main

if __name__ == "__main__":
    main()
