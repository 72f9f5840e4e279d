from mlx_wan.cli.main import door

door("inspect")
