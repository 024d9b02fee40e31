-- Makes the tables of today and the days ahead.
-- $1 partition  $2 days ahead
select shardmq.make_days_ahead($1, $2)
