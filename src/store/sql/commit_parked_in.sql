-- Ends a parked message inside a user's transaction. Nothing where the fence does not hold or it is gone.
-- Names are whole: the user's search_path may be anything.
-- $1 group  $2 partition  $3 owner  $4 epoch  $5 reset epoch  $6 incarnation  $7 id
delete from shardmq.retry r
 where r.id operator(pg_catalog.=) $7
   and exists (select from shardmq.cursor c
                where c.group_name operator(pg_catalog.=) $1 and c.partition operator(pg_catalog.=) $2
                  and c.owner operator(pg_catalog.=) $3 and c.epoch operator(pg_catalog.=) $4
                  and c.reset_epoch operator(pg_catalog.=) $5
                  and pg_catalog.pg_postmaster_start_time() operator(pg_catalog.=) $6)
