"""What the steady table says of drafter sizes: tokens per step and latency of a lone request, by drafter and verifier.

Run `python experiments/02_measure_vllm_cpu/findings.py`.
"""

import csv
from pathlib import Path

TABLE = Path(__file__).resolve().parents[2] / "data" / "vllm_cpu_steady.csv"
ARMS = {
    "small": ("k0", "small_1m", "k4", "small_17m", "small_first_1", "small_first_2", "small_first_4"),
    "large": ("large_k0", "large_1m", "large_4m", "large_17m", "large_first_1", "large_first_2", "large_first_4"),
}


def main() -> None:
    with TABLE.open(newline="", encoding="utf-8") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    print("| verifier | drafter | its parameters | rejection | tokens per step | step [ms] | e2e alone [s] |")
    print("|---|---|---|---|---|---|---|")
    for verifier, arms in ARMS.items():
        for arm in arms:
            row = rows[f"{arm}__p64_o64_c1"]
            size = f"{float(row['drafter_params']) / 1e6:.1f} M" if row["drafter_params"] else "-"
            print(
                f"| {verifier} | {row['drafter'] or 'none'} | {size} | {row['rejection']} | "
                f"{float(row['tokens_per_step'] or 1):.2f} | {1e3 * float(row['itl_mean']):.1f} | "
                f"{float(row['e2e_mean']):.2f} |"
            )


if __name__ == "__main__":
    main()
