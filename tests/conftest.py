import torch as th

th.set_num_threads(1)  # golden numbers are compared to the last digits; the order of a sum follows the threads
