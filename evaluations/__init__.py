"""Arrays in, numbers out: how near generated images are to real ones, and whether user 7 is still user 7."""
