-- Gives the relaying from a database up. One row.
-- $1 holder
select shardmq.end_relaying($1)
