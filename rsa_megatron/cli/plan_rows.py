"""What the rows of a planned run hold: an average sample's, by the flags, or those of measured lengths."""

import json
from pathlib import Path

from rsa_megatron.planning.rows import Row, Rows

# Of a packed row's positions, those that are samples', where their lengths vary and are not measured (AnyRes).
FILL = 0.95


def check_row_flags(args, packs: bool) -> None:
    """Check that flags of samples and rows do not contradict one another."""
    if args.lengths and (args.mean_length is not None or args.mean_tiles is not None or args.fill is not None):
        raise ValueError(
            "--lengths: it has the samples' positions and tiles; leave out --mean-length, --mean-tiles and --fill"
        )
    for name in ("fill", "packing_max_tiles"):
        if not packs and getattr(args, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} is of packed rows: name --packing-buffer-size (1000), or leave it out"
            )
    if args.fill is not None and args.fill > 1:
        raise ValueError(f"--fill {args.fill:g} is a share of a row: name at most 1")
    if packs and args.mean_length is not None and args.mean_length > args.seq_length:
        raise ValueError(
            f"--mean-length {args.mean_length:g}: a packed row has --seq-length {args.seq_length}; name less, or a longer row"
        )
    if packs and args.packing_max_tiles < args.most_tiles:
        raise ValueError(
            f"--packing-max-tiles {args.packing_max_tiles}: one sample may have {args.most_tiles} (--most-tiles)"
        )


def read_rows(args, packs: bool, *, varies: bool) -> Rows:
    """Read what the run's rows hold: of the flags' average sample, or packed from the samples of --lengths.

    Args:
        varies: the lengths of samples do, so that FILL is their packed rows'.
    """
    if not args.lengths:
        if not packs:
            return Rows([Row.of_mean_samples(1, args.mean_length, args.mean_tiles)])
        whole = args.seq_length // args.mean_length * args.mean_length / args.seq_length
        fill = args.fill or (max(FILL, whole) if varies else whole)
        return Rows([Row.of_mean_samples(fill * args.seq_length / args.mean_length, args.mean_length, args.mean_tiles)])
    positions, tiles = read_lengths(args.lengths, args.seq_length)
    args.mean_length, args.mean_tiles = sum(positions) / len(positions), sum(tiles) / len(tiles)
    if not packs:
        return Rows([Row.of_samples(*sample) for sample in zip(zip(positions), zip(tiles))])
    from rsa_megatron.data.packing import pack_buffers

    keys = [str(number) for number in range(len(positions))]
    packed = pack_buffers(
        positions, tiles, keys, args.seq_length, args.packing_max_tiles, buffer_size=args.packing_buffer_size
    )
    return Rows([Row.of_samples([positions[i] for i in row], [tiles[i] for i in row]) for row in packed])


def read_lengths(path: Path, seq_length: int) -> tuple[list[int], list[int]]:
    """Read positions and tiles of samples, each in at most a row: training cuts the text of longer ones."""
    try:
        content = json.loads(path.read_text())
        positions, tiles = ([int(number) for number in content[name]] for name in ("positions", "tiles"))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"--lengths {path} is not what `rsa-megatron data fill --out` writes: {error!r}") from error
    if not positions or len(positions) != len(tiles) or min(positions) < 1 or min(tiles) < 0:
        raise ValueError(f"--lengths {path}: positions and tiles must be as many, and at least one sample's")
    return [min(length, seq_length) for length in positions], tiles
