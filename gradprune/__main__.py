"""The entry point of the `gradprune` command and of `python -m gradprune`, which torchrun runs."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until `main` handles signals, Ctrl-C ends the imports without a traceback, as other signals do.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from gradprune.cli import main

if __name__ == "__main__":
    main()
