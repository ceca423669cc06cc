"""HTTP in, HTTP out: parse, authorise, call one service method, shape the answer."""
