-- The first statement of every transaction that takes a partition's lock: whatever the database's
-- defaults are. The statement timeout is lifted here, since a waiting lock statement counts against it.
begin isolation level read committed, read write; set local statement_timeout = 0
