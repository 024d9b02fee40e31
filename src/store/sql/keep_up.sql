-- Takes or keeps the upkeep of a node. Where it is another's, says too how many sessions this database has of
-- clients like this one: the more there are, the later each asks again. Primary key.
-- $1 holder  $2 lease in seconds
select k.ours,
       case when not k.ours then
           (select count(*) from pg_stat_activity s
             where s.datname = current_database() and s.usename = session_user) end
  from (select shardmq.keep_up($1, $2) as ours offset 0) k
