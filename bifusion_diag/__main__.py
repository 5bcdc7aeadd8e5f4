"""``python -m bifusion_diag`` is ``bifusion-diag``."""

from bifusion_diag.cli.app import main

if __name__ == "__main__":
    main()
