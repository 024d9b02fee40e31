-- Acknowledges one message inside a user's transaction, which holds the cursor's row until it ends.
-- Nothing where the fence does not hold, the message is acknowledged already, or another server answers
-- than the one that it was read from. Names are whole: the user's search_path may be anything.
-- $1 group  $2 partition  $3 owner  $4 epoch  $5 reset epoch  $6 incarnation  $7 id
-- $8 whether all before it is acknowledged
update shardmq.cursor c
   set acked_id = case when $8 then $7 else c.acked_id end,
       acked_ahead = case when $8
           then c.acked_ahead operator(pg_catalog.-)
                pg_catalog.int8multirange(pg_catalog.int8range(null, $7, '[]'))
           else c.acked_ahead operator(pg_catalog.+)
                pg_catalog.int8multirange(pg_catalog.int8range($7, $7, '[]')) end
 where c.group_name operator(pg_catalog.=) $1 and c.partition operator(pg_catalog.=) $2
   and c.owner operator(pg_catalog.=) $3 and c.epoch operator(pg_catalog.=) $4
   and c.reset_epoch operator(pg_catalog.=) $5
   and pg_catalog.pg_postmaster_start_time() operator(pg_catalog.=) $6
   and c.acked_id operator(pg_catalog.<) $7 and not c.acked_ahead operator(pg_catalog.@>) $7
