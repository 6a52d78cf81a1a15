"""Compares dense products of TensorFlow with what its own operations can do with sparse weights.

    python -m benchmarks.sparse_tensorflow [--width 2048]

A weight of random numbers has the same number of kept entries in every column, at random places.
"gather" reads the inputs of the kept entries and sums their products, "sparse" is
`tf.sparse.sparse_dense_matmul`, and "dense" is `tf.matmul` with and without XLA, whichever is
faster. All are compiled with `tf.function` ("gather" by XLA) and called in turns. Ratios are those
of one round, and their least, median and largest value over the rounds are printed: dense / other,
so that more than 1 is faster. Times are processor time of all threads (one is set), which other
processes on the machine hardly affect.
"""

import argparse
import os
import time

import numpy as np
import tensorflow as tf

from masked_layers.turns import seconds_per_call


def contenders(width: int, sparsity: float, batch: int):
    """Returns functions by name that compute the same product."""
    rng = np.random.default_rng(0)
    kept = round(width * (1 - sparsity))
    places = np.argsort(rng.random((width, width)), axis=1)[:, :kept]  # Inputs of each output.
    places.sort(axis=1)
    values = rng.standard_normal((width, kept)).astype("float32")
    matrix = np.zeros((width, width), "float32")
    np.put_along_axis(matrix, places, values, axis=1)
    x = tf.constant(rng.standard_normal((batch, width)).astype("float32"))
    weight, transposed = tf.constant(matrix.T), tf.sparse.from_dense(matrix)
    indices, entries = tf.constant(places.astype("int32")), tf.constant(values)

    def dense(x):
        return tf.matmul(x, weight)

    def gather(x):
        return tf.reduce_sum(tf.gather(x, indices, axis=1) * entries, axis=2)

    def sparse(x):
        return tf.transpose(tf.sparse.sparse_dense_matmul(transposed, x, adjoint_b=True))

    programs = {
        "dense": tf.function(dense),
        "dense, XLA": tf.function(dense, jit_compile=True),
        "gather": tf.function(gather, jit_compile=True),
        "sparse": tf.function(sparse),
    }
    wanted = dense(x).numpy()
    for program in programs.values():
        np.testing.assert_allclose(program(x).numpy(), wanted, atol=1e-3)
    return {name: lambda call=call: call(x).numpy() for name, call in programs.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=2048)
    arguments = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    print(f"TensorFlow {tf.__version__}, 1 thread, load average {os.getloadavg()[0]:.1f}")
    for sparsity in (0.9, 0.95, 0.99):
        for batch in (1, 8, 32):
            times = seconds_per_call(
                contenders(arguments.width, sparsity, batch),
                clock=time.process_time,
                rounds=(15, 25),
                seconds=10.0,
                warm=2,
                turn=0.03,
            )
            best = np.minimum(times["dense"], times["dense, XLA"])
            text = []
            for name in ("gather", "sparse"):
                ratios = best / times[name]
                text.append(f"{name} {ratios.min():.2f} {np.median(ratios):.2f} {ratios.max():.2f}")
            print(
                f"sparsity {sparsity:.2f}, batch {batch}: {'; '.join(text)} times as fast "
                f"(dense {1e3 * np.median(best):.2f} ms)",
                flush=True,
            )


if __name__ == "__main__":
    main()
