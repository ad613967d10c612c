"""Browse generated images beside real ones, user by user, on a page of this machine alone.

    python scripts/gallery.py --samples runs/one/samples --real_dir DATA/train --heldout_dir DATA/test

Prints the page's address; Ctrl-C ends it. Shows what evaluate_samples.py or validate.py found, if a report lies by the
samples, and marks what the sifter accepted. --out FILE.html writes all of it as one file instead, to be sent by mail.
"""

import threading
import webbrowser
from pathlib import Path

from guided_diffusion_vae.quick_help import install as without_torch

without_torch()  # nothing is computed here, so nobody has to wait for it

from evaluations.gallery_contents import GalleryConfig, collect  # noqa: E402
from evaluations.gallery_server import Server, serve, write  # noqa: E402
from evaluations.html import refuse_unwritable  # noqa: E402
from guided_diffusion_vae import dist_util  # noqa: E402
from guided_diffusion_vae.config import create_argparser, parse_run  # noqa: E402


def main(argv=None):
    run = parse_run(create_argparser(GalleryConfig, description=__doc__), argv)
    if run.dry_run:
        print(run)
        return
    if run.out:
        refuse_unwritable(run.out, "--out")
    gallery = collect(run.section(GalleryConfig))
    if run.out:
        print(write(gallery, run.out))
        address = Path(run.out).absolute().as_uri()
    else:
        server = Server(gallery, run.port)
        address = server.address
        print(f"{address} (Ctrl-C ends it)", flush=True)
    if run.open_browser:  # aside, for a browser in the terminal is waited for
        threading.Thread(target=webbrowser.open, args=(address,), daemon=not run.out).start()
    if not run.out:
        serve(server)


if __name__ == "__main__":
    dist_util.run_main(main)
