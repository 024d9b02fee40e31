-- Which server and database this control database is, where that is not known, or another.
-- $1 server and database, or null
update shardmq_control.cluster set server = $1 where server is distinct from $1
