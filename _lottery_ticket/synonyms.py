"""What other libraries and papers call the commands, options and names of this one."""

_BY_MAGNITUDE = ("large_final", "smallest_weights", "iterative", "gradual", "one_shot")
_GLOBALLY = ("smallest_weights_global", *_BY_MAGNITUDE[2:])
_OTHERS = {
    # Criteria, and methods of `prune`.
    _BY_MAGNITUDE: "magnitude magnitudes mag magnitude_pruning weight_magnitude low_magnitude "
    "prune_low_magnitude layer_magnitude abs l1 l2 l1_norm l2_norm l1_unstructured l1unstructured",
    _GLOBALLY: "global_magnitude magnitude_global global_unstructured global_magnitude_pruning",
    ("random",): "random_unstructured randomunstructured random_pruning",
    ("snip",): "connection_sensitivity",
    ("grasp",): "gradient_flow gradient_signal_preservation",
    ("synflow",): "synaptic_flow",
    ("saliency",): "taylor taylor_fo first_order",
    ("scale",): "slimming network_slimming bn_scale bnscale batchnorm",
    ("geometric_median",): "fpgm",
    ("run", "iterative"): "imp lth ticket lottery lottery_ticket iterative_magnitude_pruning",
    ("gradual",): "gmp agp polynomial polynomial_decay polynomialdecay",
    ("one_shot",): "sparsegpt obc obs post_training",
    ("channels",): "structured torch_pruning depgraph",
    ("channels", "filters"): "neurons filter_pruning channel_pruning",
    # Other names that options take.
    ("learning_rate_rewinding",): "lr_rewinding lrr",
    ("global",): "model network whole globally",
    ("layer",): "local locally uniform",
    ("sgd",): "momentum",
    ("lenet-300-100",): "mlp fc fully_connected",
    ("conv-2",): "cnn convnet",
    ("fashion_mnist",): "fmnist",
    ("saved_model",): "tf tensorflow",
    ("torch",): "pytorch pt torchscript",
    ("onnx",): "ort onnxruntime",
    ("all",): "tflite litert lite",
    ("float32",): "fp32 f32",
    ("float16",): "fp16 f16 half",
    ("bfloat16",): "bf16",
    ("slurm",): "submitit",
    ("dask",): "distributed",
    ("tensorboard",): "tb",
    ("wandb",): "weights_and_biases",
    ("max",): "maximize",
    ("min",): "minimize",
    # Options.
    ("--learning-rate",): "lr",
    ("--rate", "--sparsity"): "amount pruning_ratio pruning_rate ratio",
    ("--sparsity", "--final-sparsity"): "target_sparsity",
    ("--max-drop",): "tolerance",
    ("--macs",): "flops",
    ("--strategy",): "criterion importance",
    ("--data",): "dataset",
    ("--network",): "arch architecture model",
    ("--out",): "output output_dir out_dir save_dir",
    ("--rounds",): "levels",
    ("--steps", "--rounds"): "iterations",
    ("--overwrite",): "force",
    ("--quiet",): "silent",
    ("--minutes",): "timeout time time_limit",
    ("--jobs",): "workers num_workers n_jobs processes",
    ("--devices",): "gpus gpu device",
    # Commands.
    ("run",): "train find find_ticket",
    ("prune",): "compress",
    ("compare",): "evaluate eval benchmark",
    ("inspect",): "show info summary",
    ("export",): "convert",
    ("repeat",): "rerun reproduce resume",
    ("report",): "plot results",
    ("sweep",): "search grid tune",
}
# Each of them, with lower-case letters and underscores, and what it may mean here.
MEANT: dict[str, tuple[str, ...]] = {}
for _meant, _names in _OTHERS.items():
    for _name in _names.split():
        MEANT[_name] = (*MEANT.get(_name, ()), *_meant)
