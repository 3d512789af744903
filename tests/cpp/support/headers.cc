// The target whose precompiled headers the tests share.
