"""Cost of an epoch's order for each sample, with few and with many shards.

    python -m benchmarks.many_shards [--shards 125 200000] [--samples 5000000]

Processor time of a draw from the mixture, as the stream makes two for each sample. ``summed`` counts a corpus's samples
again at each draw, as the stream did before. Both take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time

from priorclip.data_shards.order.mixture import Mixture, MixturePart

DRAWS = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, nargs="+", default=[125, 200_000])
    parser.add_argument("--samples", type=int, default=5_000_000)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    for shards in options.shards:
        mixture = Mixture([MixturePart([options.samples // shards] * shards)], 0, 32, 2048)
        spent: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(options.runs + 1):
            for is_summed, times in spent.items():
                begun = time.process_time()
                for position in range(DRAWS):
                    if is_summed:
                        vars(mixture.parts[0]).pop("samples", None)
                    mixture.draw(0, position)
                if turn:  # the first warms up
                    times.append((time.process_time() - begun) / DRAWS)
        kept, summed = (1e6 * statistics.median(times) for times in spent.values())
        print(f"{shards:>9,} shards: {kept:.1f} us a draw, summed {summed:.1f} us, ratio {summed / kept:.0f}")


if __name__ == "__main__":
    main()
