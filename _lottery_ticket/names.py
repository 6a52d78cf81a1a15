"""Names that options take, which a test compares with the registries and modules they come from."""

DATASETS = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar10_reduced_10x")
DOWNLOADED = DATASETS[1:]
NETWORKS = ("lenet-300-100", "conv-2", "conv-4", "conv-6", "resnet-20")
# Endings of files with a model, and of tickets.
MODEL_FILES = (".keras", ".h5", ".hdf5")
TICKET_FILE = ".safetensors"
# Endings of files with data, which only a function of the user can read.
DATA_FILES = (".npz", ".npy", ".csv", ".h5", ".hdf5", ".parquet", ".pkl", ".tfrecord", ".zip")
OPTIMIZERS = ("adam", "sgd")

# Criteria that rank recorded weights in layers: those of Zhou et al. and the earlier library.
RECORDED = (
    "large_final",
    "small_final",
    "large_init",
    "small_init",
    "large_init_large_final",
    "small_init_small_final",
    "magnitude_increase",
    "movement",
    "random",
    "large_final_same_sign",
    "large_final_diff_sign",
    "magnitude_increase_same_sign",
    "magnitude_increase_diff_sign",
)
CRITERIA = (
    *RECORDED,
    "smallest_weights",
    "smallest_weights_global",
    "snip",
    "grasp",
    "synflow",
    "gradient",
    "saliency",
    "wanda",
)
# Those with a scope of their own, which replaces that of the network's recipe.
GLOBAL = ("smallest_weights_global", "snip", "grasp", "synflow")
CHANNEL_CRITERIA = ("scale", "geometric_median")

RETRAINING = ("weight_rewinding", "learning_rate_rewinding", "fine_tuning")
KEPT = (
    "rewind",
    "reinit",
    "reshuffle",
    "constant",
    "finetune",
    "reinit_same_sign",
    "reshuffle_same_sign",
    "constant_same_sign",
)
PRUNED = ("zero", "freeze", "zero_if_shrunk", "zero_if_shrunk_all")
CONTROLS = ("random_reinit", "reinit_same_sign", "random_mask", "reshuffled_mask")
WEIGHTS = ("initial", "signed_constant")
EXECUTORS = ("local", "ray", "slurm", "dask")
