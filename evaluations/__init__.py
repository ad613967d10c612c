"""How near generated spectrograms are to real ones, and whether user 7 is still user 7: arrays in, numbers out.

reading           image_sets: folders and .npz files as arrays; batches: the same in a stream, however large;
                  value_range: whether pixels are 0..255
features          inception with inception_graph and graphdef: the 2015 network; user_classifier: the judge, who learns
                  from real images who is walking; features: every space by name, with a cache
numbers           statistics: Frechet and kernel distances; manifold: precision, recall, density, coverage, nearest;
                  official: the five numbers in the official arithmetic; roc; reconstruction: PSNR and SSIM
parts             classifier_tests with shortcut, verification with metric_learning, measure, physics, sifting,
                  memorization with copying, leaks, side_by_side: each makes a section; augmentation: the study
                  sessions: whether two sets are of the same recordings; progress: how far a long part is
reports           findings: a number between the worst and real images, and its verdict; short: the verdicts on what
                  matters; glossary: what abbreviations mean; html; report: the table of evaluate_samples.py
looking           gallery_contents with gallery_report, gallery_page with gallery_style, gallery_server: in a browser
commands          evaluator, make_reference: the official tool's; validation: what scripts/validate.py asks

The package guided_diffusion_vae never imports this one.
"""

import guided_diffusion_vae  # noqa: F401  (before PyTorch, which `--help` does without: see its quick_help)
