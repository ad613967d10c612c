"""How near a reconstruction is to its image: PSNR in decibels and SSIM."""

import numpy as np
from scipy.ndimage import gaussian_filter


def psnr(images, reconstructions, peak: float = 255.0) -> np.ndarray:
    """10 log10(peak^2 / MSE) of each image: (N,); infinite where they are equal.

    Args:
        images, reconstructions: (N, H, W, C), in [0, peak].
    """
    images, reconstructions = (np.asarray(x, dtype=np.float64) for x in (images, reconstructions))
    mse = ((images - reconstructions) ** 2).reshape(len(images), -1).mean(axis=1)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(peak**2 / mse)


def ssim(images, reconstructions, peak: float = 255.0) -> np.ndarray:
    """Structural similarity of each image, (N,) in [-1, 1]: Gaussian window of 1.5 pixels, mean over channels.

    Source: Wang et al. 2004, equation 13, K_1 = 0.01 and K_2 = 0.03.
    """
    x, y = (np.asarray(a, dtype=np.float64) for a in (images, reconstructions))

    def blur(a):
        return gaussian_filter(a, sigma=(0, 1.5, 1.5, 0), truncate=3.5)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    similar /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return similar.reshape(len(x), -1).mean(axis=1)
