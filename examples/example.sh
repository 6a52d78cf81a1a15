#!/bin/sh
# Runs example.py for all strategies and data sets; other options are passed to it:
#
#     examples/example.sh --data-dir DIR --iterations 5
#     examples/example.sh --quick
#
# The variables PYTHON, SETS and STRATEGIES override the interpreter, data sets and strategies.
set -eu

here=$(dirname "$0")
sets="mnist fashion_mnist cifar10_reduced_10x"
strategies="large_final large_init small_final small_init large_init_large_final
    small_init_small_final magnitude_increase movement random smallest_weights
    smallest_weights_global"
case " $* " in
*" --quick "*)
    sets="digits"
    strategies="large_final random"
    ;;
esac

for data in ${SETS:-$sets}; do
    for strategy in ${STRATEGIES:-$strategies}; do
        echo "== $data, $strategy"
        "${PYTHON:-python}" "$here/example.py" --which_set "$data" --prune_strategy "$strategy" "$@"
    done
done
