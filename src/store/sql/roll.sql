-- Moves a partition to the server's date, and makes its table where that is missing.
-- $1 partition  $2 the client's clock
select outcome, day from shardmq.roll($1, $2)
