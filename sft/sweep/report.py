def write_sweep_report(board):
    pass
