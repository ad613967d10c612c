"""How near generated spectrograms are to real ones, and whether user 7 is still user 7: arrays in, numbers out.

image_sets        folders and .npz files as arrays
statistics        distances between two clouds of features: Frechet, kernel
manifold          neighbourhoods: precision, recall, density, coverage, nearest training images
user_classifier   the judge: learns from real images who is walking; its features are the space of FD_user
measure           all of it on samples, held-out real images and the worst images, at the same number of each
report            every number between its floor and its ceiling: a table, report.json and a picture
reconstruction    PSNR and SSIM of an autoencoder

The package guided_diffusion_vae never imports this one.
"""
